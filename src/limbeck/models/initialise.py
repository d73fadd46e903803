"""Starting values for Hyena mixers, from the attention they replace.

Copying query, key and value weights into Hyena's projections explodes on real models: their product is cubic in scale.
`calibrate` keeps what is useful of them: the value projection as it is, the two gates rescaled to stay near one, a long
filter fitted to the teacher's mean attention by lag, and an output projection solved by least squares on captured
activations. No gradient step is taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from limbeck.core.errors import RecipeError
from limbeck.core.types import Batch
from limbeck.models.documents import forward_packed
from limbeck.models.packing import forward_batch, without_head
from limbeck.models.recording import recording
from limbeck.models.surgery import AttentionSite, find_attention, projections
from limbeck.nn.hyena import HyenaOperator

# How strongly the gates of the channel groups move. With one group each is tried; several groups share them out.
GATE_STRENGTHS = ((0.0,), (0.25,), (0.5,), (1.0,))
_SHARED_STRENGTHS = (0.0, 1.0, 0.5, 2.0, 0.25, 4.0)
RIDGES = (1e-4, 1e-3, 1e-2)


@dataclass(frozen=True)
class LayerFit:
    """Held-out normalised MSE of one layer's mixer against the teacher's attention output (1 = no better than zero)."""

    layer: int
    before: float
    after: float


def copy_projections(operator: HyenaOperator, site: AttentionSite) -> None:
    """Copy query, key, value and output weights unscaled; the short convolution starts as the identity.

    Source: arXiv:2408.15237, section 2.2 (attention weights as the start of a linear mixer); known to explode with
    Hyena's triple product on real models, kept for comparison.
    """
    parts = projections(site)
    groups = channel_groups(operator, parts.v.shape[0])
    with torch.no_grad():
        for group in range(groups):
            _set_projection(operator, 0, parts.q, parts.q_bias, group=group)
            for gate in range(1, operator.order):
                _set_projection(operator, gate, parts.k, parts.k_bias, group=group)
            _set_projection(operator, operator.order, parts.v, parts.v_bias, group=group)
        operator.out_proj.weight.copy_(parts.o.repeat(1, groups) / groups)
        if operator.out_proj.bias is not None:
            operator.out_proj.bias.copy_(
                torch.zeros_like(operator.out_proj.bias) if parts.o_bias is None else parts.o_bias
            )
        set_identity_short_convolution(operator)


def _set_projection(
    operator: HyenaOperator, block: int, weight_CD: Tensor, bias_C: Tensor | None, *, group: int = 0
) -> None:
    """Write one stream's rows (gate or value) for one group of channels, each group as wide as the attention."""
    width = weight_CD.shape[0]
    first = block * operator.inner_width + group * width
    rows = slice(first, first + width)
    operator.in_proj.weight[rows] = weight_CD.to(operator.in_proj.weight)
    if operator.in_proj.bias is not None:
        operator.in_proj.bias[rows] = 0.0 if bias_C is None else bias_C.to(operator.in_proj.bias)


def channel_groups(operator: HyenaOperator, attention_width: int) -> int:
    """How many times the operator's channels hold the attention's heads times head width.

    Raises: RecipeError when they do not hold them a whole number of times.
    """
    groups, rest = divmod(operator.inner_width, attention_width)
    if rest or not groups:
        raise RecipeError(
            f"student.hyena: {operator.inner_width} inner channels are not a multiple of the attention's {attention_width}, "
            "so its weights cannot start them. Set hyena.expand to a whole number, or student.initialisation: random."
        )
    return groups


def set_identity_short_convolution(operator: HyenaOperator) -> None:
    """Make the short convolution pass its input through unchanged."""
    with torch.no_grad():
        operator.short_weight.zero_()
        operator.short_weight[:, -1] = 1.0
        operator.short_bias.zero_()


def capture(
    model: nn.Module, batches: Sequence[Batch], mixers: Mapping[int, nn.Module]
) -> dict[int, tuple[Tensor, Tensor]]:
    """Inputs and outputs [rows, T, D] of the given mixers while the model reads the batches. No gradients."""
    inputs: dict[int, list[Tensor]] = {layer: [] for layer in mixers}
    outputs: dict[int, list[Tensor]] = {layer: [] for layer in mixers}
    for batch in batches:
        with torch.no_grad(), recording(mixers) as seen:
            forward_batch(without_head(model), batch)
        for layer in mixers:
            inputs[layer].append(seen.inputs[layer])
            outputs[layer].append(seen.outputs[layer])
    return {layer: (torch.cat(inputs[layer]), torch.cat(outputs[layer])) for layer in mixers}


def mean_attention_by_lag(teacher: Any, batches: Sequence[Batch], *, layers: Sequence[int]) -> dict[int, Tensor]:
    """Average attention weight [H, K] that each head gives to the token `lag` positions back.

    The mean is over positions t >= lag, rows, and real pairs (packed documents give zero across). Runs the teacher with
    its eager attention for this alone.
    """
    sums: dict[int, Tensor] = {}
    counts_K: Tensor | float = 0.0
    with _eager_attention(teacher), torch.no_grad():
        for ids_BT, documents_BT in _single_rows(batches):
            attentions = forward_packed(teacher, ids_BT, documents_BT, output_attentions=True).attentions
            for layer in layers:
                by_lag_HK = _sum_by_lag(attentions[layer].float().sum(0))
                sums[layer] = sums[layer] + by_lag_HK if layer in sums else by_lag_HK
            counts_K = counts_K + torch.arange(ids_BT.shape[1], 0, -1, dtype=torch.float32, device=ids_BT.device)
    return {layer: total / counts_K for layer, total in sums.items()}


def _single_rows(batches: Sequence[Batch]) -> Iterator[tuple[Tensor, Tensor | None]]:
    """One row at a time: the attention maps of all layers of a single row are large enough."""
    for batch in batches:
        for row in range(batch.input_ids_BT.shape[0]):
            documents = batch.document_ids_BT
            yield batch.input_ids_BT[row : row + 1], None if documents is None else documents[row : row + 1]


def _sum_by_lag(weights_HTT: Tensor) -> Tensor:
    """Sum of each lower diagonal: [H, T, T] -> [H, T] by lag."""
    width = weights_HTT.shape[-1]
    return torch.stack(
        [torch.diagonal(weights_HTT, offset=-lag, dim1=-2, dim2=-1).sum(-1) for lag in range(width)], dim=-1
    )


@contextmanager
def _eager_attention(model: Any) -> Iterator[None]:
    before = model.config._attn_implementation
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def calibrate(
    teacher: Any, operators: Mapping[int, HyenaOperator], batches: Sequence[Batch], heldout: Sequence[Batch]
) -> list[LayerFit]:
    """Give every operator a calibrated start and say how well each fits on held-out windows.

    teacher: any HF causal LM with attention at the operators' layers. batches: windows to solve on; heldout: other
    windows, for the errors and for choosing how strongly the gates move.
    Source: our own; the mean attention by lag as a filter target and the closed-form output projection follow the
    argument of arXiv:2606.16429 (start from the teacher's statistics), none of which treats Hyena.
    """
    sites = {site.layer_index: site for site in find_attention(teacher) if site.layer_index in operators}
    modules = {layer: site.module for layer, site in sites.items()}
    seen, unseen = capture(teacher, batches, modules), capture(teacher, heldout, modules)
    lags = mean_attention_by_lag(teacher, batches[: max(1, len(batches) // 4)], layers=list(operators))
    document_ids = stack_documents(batches), stack_documents(heldout)
    fits = []
    for layer, operator in operators.items():
        before = normalised_error(operator, *unseen[layer], document_ids_BT=document_ids[1])
        after = _calibrate_layer(operator, sites[layer], seen[layer], unseen[layer], lags[layer], document_ids)
        fits.append(LayerFit(layer, before, after))
    return fits


def stack_documents(batches: Sequence[Batch]) -> Tensor | None:
    """Document ids of several batches as one [rows, T], or None when no row holds two documents."""
    if all(batch.document_ids_BT is None for batch in batches):
        return None
    return torch.cat(
        [torch.zeros_like(b.input_ids_BT) if b.document_ids_BT is None else b.document_ids_BT for b in batches]
    )


def _calibrate_layer(
    operator: HyenaOperator,
    site: AttentionSite,
    seen: tuple[Tensor, Tensor],
    unseen: tuple[Tensor, Tensor],
    lags_HK: Tensor,
    document_ids: tuple[Tensor | None, Tensor | None],
) -> float:
    parts = projections(site)
    groups = channel_groups(operator, parts.v.shape[0])
    set_identity_short_convolution(operator)
    _fit_filters(operator, lags_HK, head_dim=parts.head_dim)
    with torch.no_grad():
        operator.skip_bias.zero_()
        for group in range(groups):
            _set_projection(operator, operator.order, parts.v, parts.v_bias, group=group)
    shared = tuple(_SHARED_STRENGTHS[group % len(_SHARED_STRENGTHS)] for group in range(groups))
    trials = [
        _try_gates(operator, parts, seen, unseen, document_ids, strengths=strengths)
        for strengths in (GATE_STRENGTHS if groups == 1 else (shared,))
    ]
    best = min(trials, key=lambda trial: trial.error)
    _set_gates(operator, parts, seen[0], strengths=best.strengths)
    with torch.no_grad():
        rms_C = _value_rms(parts, seen[0])
        bias_C = None if parts.v_bias is None else parts.v_bias.to(rms_C) / rms_C
        for group in range(groups):
            _set_projection(operator, operator.order, parts.v.to(rms_C) / rms_C[:, None], bias_C, group=group)
        last: Any = operator.filters[-1]
        last.scale(rms_C.repeat(groups) * best.unit_C)
        operator.out_proj.weight.copy_(best.weight_DC)
        if operator.out_proj.bias is not None:
            operator.out_proj.bias.copy_(best.bias_D)
    return best.error


def _value_rms(parts: Any, inputs_BTD: Tensor) -> Tensor:
    """RMS of each value channel on these inputs, [C]."""
    bias_C = None if parts.v_bias is None else parts.v_bias.to(inputs_BTD)
    value_BTC = nn.functional.linear(inputs_BTD, parts.v.to(inputs_BTD), bias_C)
    return value_BTC.square().mean((0, 1)).sqrt().clamp_min(1e-6)


@dataclass(frozen=True)
class _Trial:
    """One way to set the gates, with the output projection solved for it. unit_C: what gives each channel unit RMS."""

    strengths: tuple[float, ...]
    unit_C: Tensor
    weight_DC: Tensor
    bias_D: Tensor
    error: float


def _try_gates(
    operator: HyenaOperator,
    parts: Any,
    seen: tuple[Tensor, Tensor],
    unseen: tuple[Tensor, Tensor],
    document_ids: tuple[Tensor | None, Tensor | None],
    *,
    strengths: tuple[float, ...],
) -> _Trial:
    """Solve the output projection for gates of these strengths, on channels brought to unit RMS.

    Unit channels (values and filtered values alike) and a firm ridge keep every weight at an ordinary size: training goes
    on from it with ordinary rates, where a bare least-squares solution (large weights that cancel, tiny taps) falls
    apart at the first step. Of the ridges, the firmest
    whose held-out error is within two per cent of the best is taken.
    """
    _set_gates(operator, parts, seen[0], strengths=strengths)
    known = moments(inner_output(operator, seen[0], document_ids_BT=document_ids[0]), seen[1])
    fresh = moments(inner_output(operator, unseen[0], document_ids_BT=document_ids[1]), unseen[1])
    rms_C = (known.gram_MM.diagonal()[:-1] / known.gram_MM[-1, -1]).sqrt()
    unit_C = 1 / rms_C.clamp_min(1e-3 * float(rms_C.mean()) + 1e-12)
    known, fresh = known.scaled(unit_C), fresh.scaled(unit_C)
    has_bias = operator.out_proj.bias is not None
    found = []
    for ridge in RIDGES:
        weight_DC, bias_D = ridge_solution(known, ridge=ridge, has_bias=has_bias)
        error = fresh.squared_error(weight_DC, bias_D) / max(fresh.energy, 1e-30)
        found.append(_Trial(strengths, unit_C.to(seen[0]), weight_DC, bias_D, error))
    least = min(trial.error for trial in found)
    return next(trial for trial in reversed(found) if trial.error <= 1.02 * least)


@dataclass(frozen=True)
class Moments:
    """All that least squares needs to know of features and targets: sums of products, in float64.

    gram_MM: products of the features, a constant 1 after them, with themselves; cross_MD: with the targets; energy: the
    targets' sum of squares. M is C + 1.
    """

    gram_MM: Tensor
    cross_MD: Tensor
    energy: float

    def scaled(self, factor_C: Tensor) -> Moments:
        """The moments of the features times a factor per channel."""
        factor_M = torch.cat([factor_C, factor_C.new_ones(1)])
        return Moments(self.gram_MM * factor_M * factor_M[:, None], self.cross_MD * factor_M[:, None], self.energy)

    def squared_error(self, weight_DC: Tensor, bias_D: Tensor) -> float:
        """Sum of squares of weight @ features + bias - targets."""
        weight_DM = torch.cat([weight_DC, bias_D[:, None]], dim=1)
        return (
            float((weight_DM @ self.gram_MM * weight_DM).sum() - 2 * (weight_DM * self.cross_MD.T).sum()) + self.energy
        )


def moments(features_BTC: Tensor, targets_BTD: Tensor, *, rows: int = 8) -> Moments:
    """The moments of captured features and targets, gathered a few rows at a time."""
    channels, width = features_BTC.shape[-1], targets_BTD.shape[-1]
    gram_MM = torch.zeros(channels + 1, channels + 1, dtype=torch.float64, device=features_BTC.device)
    cross_MD = torch.zeros(channels + 1, width, dtype=torch.float64, device=features_BTC.device)
    energy = 0.0
    for low in range(0, features_BTC.shape[0], rows):
        features_NC = features_BTC[low : low + rows].flatten(0, -2).double()
        features_NM = torch.cat([features_NC, features_NC.new_ones(features_NC.shape[0], 1)], dim=1)
        targets_ND = targets_BTD[low : low + rows].flatten(0, -2).double()
        gram_MM += features_NM.T @ features_NM
        cross_MD += features_NM.T @ targets_ND
        energy += float(targets_ND.square().sum())
    return Moments(gram_MM, cross_MD, energy)


def ridge_solution(known: Moments, *, ridge: float, has_bias: bool) -> tuple[Tensor, Tensor]:
    """Weights [D, C] and bias [D] that map features to targets with least squares.

    ridge: penalty on the weights (never on the bias), as a share of the features' mean energy about their mean. Without a
    bias, [D] is zeros.
    """
    gram_MM, cross_MD = known.gram_MM, known.cross_MD
    mean_C = gram_MM[-1, :-1] / gram_MM[-1, -1] * has_bias
    mean_D = cross_MD[-1] / gram_MM[-1, -1] * has_bias
    gram_CC = gram_MM[:-1, :-1] - gram_MM[-1, -1] * mean_C[:, None] * mean_C
    cross_CD = cross_MD[:-1] - gram_MM[-1, -1] * mean_C[:, None] * mean_D
    gram_CC.diagonal().add_(ridge * float(gram_CC.diagonal().mean()) + torch.finfo(torch.float32).tiny)
    weight_DC = torch.linalg.solve(gram_CC, cross_CD).T
    return weight_DC, mean_D - weight_DC @ mean_C


def _fit_filters(operator: HyenaOperator, lags_HK: Tensor, *, head_dim: int) -> None:
    """The filter applied last follows the heads' mean attention by lag; those before it pass their input through."""
    target_CK = lags_HK.repeat_interleave(head_dim, dim=0).repeat(
        operator.inner_width // (head_dim * lags_HK.shape[0]), 1
    )
    impulse_CK = torch.zeros_like(target_CK)
    impulse_CK[:, 0] = 1.0
    filters: list[Any] = list(operator.filters)
    *earlier, last = filters
    with torch.enable_grad():
        for long_filter in earlier:
            long_filter.fit(impulse_CK)
        last.fit(target_CK)


def _set_gates(operator: HyenaOperator, parts: Any, inputs_BTD: Tensor, *, strengths: Sequence[float]) -> None:
    """Gates of 1 + strength * (query or key, scaled to unit RMS per channel on these inputs), a strength per channel group."""
    streams = [(parts.q, parts.q_bias)] + [(parts.k, parts.k_bias)] * (operator.order - 1)
    with torch.no_grad():
        for block, (weight_CD, bias_C) in enumerate(streams):
            weight_CD = weight_CD.to(inputs_BTD)
            bias_C = weight_CD.new_zeros(weight_CD.shape[0]) if bias_C is None else bias_C.to(inputs_BTD)
            raw_BTC = nn.functional.linear(inputs_BTD, weight_CD, bias_C)
            unit_C = 1 / raw_BTC.square().mean((0, 1)).sqrt().clamp_min(1e-6)
            for group, strength in enumerate(strengths):
                scale_C = strength * unit_C
                _set_projection(operator, block, weight_CD * scale_C[:, None], bias_C * scale_C + 1.0, group=group)


def inner_output(
    operator: HyenaOperator, inputs_BTD: Tensor, *, document_ids_BT: Tensor | None, rows: int = 8
) -> Tensor:
    """What the operator hands to its output projection, [B, T, C], in blocks of rows."""
    found = []
    with torch.no_grad(), recording({0: operator.out_proj}) as seen:
        for low in range(0, inputs_BTD.shape[0], rows):
            documents = None if document_ids_BT is None else document_ids_BT[low : low + rows]
            operator(inputs_BTD[low : low + rows], document_ids_BT=documents)
            found.append(seen.inputs[0])
    return torch.cat(found)


def normalised_error(
    operator: HyenaOperator, inputs_BTD: Tensor, outputs_BTD: Tensor, *, document_ids_BT: Tensor | None, rows: int = 8
) -> float:
    """Normalised MSE of an operator on captured activations: 0 is perfect, 1 is an output of zero."""
    error = 0.0
    with torch.no_grad():
        for low in range(0, inputs_BTD.shape[0], rows):
            documents = None if document_ids_BT is None else document_ids_BT[low : low + rows]
            answer_BTD = operator(inputs_BTD[low : low + rows], document_ids_BT=documents)
            error += float((answer_BTD - outputs_BTD[low : low + rows]).double().square().sum())
    return error / max(float(outputs_BTD.double().square().sum()), 1e-30)
