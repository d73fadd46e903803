"""Learned maps from the student's hidden states to the teacher's width, kept apart from the student.

They are trained beside it and saved in checkpoints of the run, never with the model: what is kept is the student alone.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.models.layer_maps import LayerPair


class FeatureProjections(nn.Module):
    """One linear map without bias for each pair of layers; where the widths are equal there is none, unless `always`.

    pairs: as `layer_map` gives them. always: learn a map although the widths are equal (it starts as the identity).
    Others start semi-orthogonal, which keeps lengths when the teacher is the wider. seed: of
    the drawn start. Parameters are float32, whatever the student's dtype.
    """

    def __init__(
        self,
        pairs: Iterable[LayerPair],
        *,
        student_width: int,
        teacher_width: int,
        always: bool = False,
        seed: int = 0,
    ):
        super().__init__()
        self.student_width, self.teacher_width = student_width, teacher_width
        self.pairs = tuple(pairs)
        self.weights_ED = nn.ParameterDict()
        if student_width == teacher_width and not always:
            return
        chance = torch.Generator().manual_seed(seed)
        for pair in self.pairs:
            weight_ED = torch.eye(teacher_width, student_width)
            if student_width != teacher_width:
                nn.init.orthogonal_(weight_ED, generator=chance)
            self.weights_ED[_key(pair)] = nn.Parameter(weight_ED)

    def forward(self, student_BTD: Tensor, pair: LayerPair) -> Tensor:
        """The student's hidden states in the teacher's width: [B, T, D] to [B, T, E]. Gradients flow to both.

        Raises: KeyError for a pair that was not announced.
        """
        if pair not in self.pairs:
            raise KeyError(f"no projection for student layer {pair[0]} and teacher layer {pair[1]}")
        if not self.weights_ED:
            return student_BTD
        weight_ED = self.weights_ED[_key(pair)]
        return F.linear(student_BTD.to(weight_ED.dtype), weight_ED)


def _key(pair: LayerPair) -> str:
    return f"student_{pair[0]}_teacher_{pair[1]}"
