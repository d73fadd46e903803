"""Rows that the student writes itself, and a store of them for reuse."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from limbeck.core.errors import CheckpointError
from limbeck.core.runtime import world_size
from limbeck.core.types import Batch
from limbeck.objectives.policy import sampling_log_probs

# Ends the key of a row that the student wrote. Its beginning stays, so that rows still go to the teacher of their domain.
_WRITTEN = "~written"


@dataclass(frozen=True)
class Writing:
    """How the student writes.

    prompt_tokens: tokens of the text that are given. max_new_tokens: most tokens written; None takes what room the
    prompt leaves in the window. temperature, top_p: of the sampling. end_token: writing ends with it; None never ends
    before the last token. rows_at_a_time: bounds the memory; None writes all rows together.
    """

    prompt_tokens: int
    max_new_tokens: int | None = None
    temperature: float = 1.0
    top_p: float = 1.0
    end_token: int | None = None
    rows_at_a_time: int | None = None


class RowWriter:
    """Puts what the student writes in the place of rows of text.

    A row becomes the beginning of its longest document, the prompt, and then what the student makes of it, up to the end token
    or the last place; padding follows. Only the written tokens are scored. Everything is drawn from torch's global
    generator of the device.

    student: generates with its own cache, in evaluation mode and without gradients. vocabulary_size: token ids stay
    below it. teacher: a causal LM of the same tokens, of whose distribution `teacher_share` is mixed in.
    """

    def __init__(
        self, student: nn.Module, writing: Writing, *, vocabulary_size: int, teacher: Any = None, teacher_share: float = 0.0
    ):  # fmt: skip
        self._student: Any = student
        self.writing, self.vocabulary_size = writing, vocabulary_size
        self.teacher, self.teacher_share = teacher, teacher_share

    def write(self, batch: Batch, chosen_B: Tensor) -> Batch:
        """The batch with new rows where `chosen_B` is True; the other rows are as they were."""
        rows = chosen_B.nonzero().flatten().tolist()
        if not rows:
            return batch
        prompts = [self._prompt(batch, row) for row in rows]
        ids_RT = torch.full_like(batch.input_ids_BT[: len(rows)], self._pad)
        mask_RT = torch.zeros_like(ids_RT, dtype=torch.bool)
        for room, places in self._together(prompts, width=ids_RT.shape[1]):
            writings = self._continue([prompts[place] for place in places], max_new_tokens=room)
            for place, written in zip(places, writings, strict=True):
                begin, end = len(prompts[place]), len(prompts[place]) + len(written)
                ids_RT[place, :begin], ids_RT[place, begin:end] = prompts[place], written
                mask_RT[place, begin:end] = True
        return replace_rows(batch, chosen_B, ids_RT, mask_RT)

    def _together(self, prompts: Sequence[Tensor], *, width: int) -> Iterator[tuple[int, list[int]]]:
        """Which prompts are continued together and by how many tokens at most: those with equal room.

        A prompt that is shorter than asked has the room of one that is not, so that it goes with the others.
        """
        places: dict[int, list[int]] = {}
        least = min(self.writing.prompt_tokens, width - 1)
        for place, prompt in enumerate(prompts):
            room = width - max(len(prompt), least)
            places.setdefault(min(self.writing.max_new_tokens or room, room), []).append(place)
        step = self.writing.rows_at_a_time or len(prompts)
        for room, some in sorted(places.items()):
            yield from ((room, some[low : low + step]) for low in range(0, len(some), step))

    @property
    def _pad(self) -> int:
        return self.writing.end_token or 0

    def _prompt(self, batch: Batch, row: int) -> Tensor:
        documents = None if batch.document_ids_BT is None else batch.document_ids_BT[row]
        return prompt_of(
            batch.input_ids_BT[row], batch.loss_mask_BT[row], documents, prompt_tokens=self.writing.prompt_tokens
        )

    def _continue(self, prompts: Sequence[Tensor], *, max_new_tokens: int) -> list[Tensor]:
        """What the student writes after each prompt, with the end token if it came to one."""
        from transformers import GenerationConfig, LogitsProcessorList

        longest = max(map(len, prompts))
        ids_RT = torch.stack([F.pad(prompt, (longest - len(prompt), 0), value=self._pad) for prompt in prompts])
        mask_RT = torch.stack([F.pad(torch.ones_like(prompt), (longest - len(prompt), 0)) for prompt in prompts])
        settings = GenerationConfig(
            do_sample=True, temperature=1.0, top_k=0, top_p=self.writing.top_p, use_cache=True,
            max_new_tokens=max_new_tokens, eos_token_id=self.writing.end_token, pad_token_id=self._pad,
        )  # fmt: skip
        choose = _Choose(self, mask_RT)
        with torch.no_grad(), _evaluating(self._student), _without_habits(self._student):
            out_RT = self._student.generate(
                ids_RT, attention_mask=mask_RT, generation_config=settings, logits_processor=LogitsProcessorList([choose])
            )  # fmt: skip
        return [self._ended(written_T) for written_T in out_RT[:, longest:]]

    def _ended(self, written_T: Tensor) -> Tensor:
        if self.writing.end_token is None:
            return written_T
        ends = (written_T == self.writing.end_token).nonzero()
        return written_T[: int(ends[0]) + 1] if len(ends) else written_T


class _Choose:
    """The distribution that the next token is drawn from, in the place of the student's logits, as generate() calls it."""

    def __init__(self, writer: RowWriter, mask_RT: Tensor):
        self._writer = writer
        self._mask_RT = mask_RT
        self._cache: Any = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        writer, size = self._writer, self._writer.vocabulary_size
        theirs_RV = self._teacher_logits(input_ids)[:, :size].to(scores) if writer.teacher_share else None
        drawn_RV = sampling_log_probs(
            scores[:, :size], theirs_RV, teacher_share=writer.teacher_share, temperature=writer.writing.temperature
        )
        return F.pad(drawn_RV, (0, scores.shape[-1] - size), value=-torch.inf)

    def _teacher_logits(self, input_ids: Tensor) -> Tensor:
        """The teacher's logits of the next token, with a cache of its own."""
        teacher = self._writer.teacher
        device = next(teacher.parameters()).device
        new = input_ids.shape[1] - self._mask_RT.shape[1]
        mask_RT = F.pad(self._mask_RT, (0, new), value=1)
        seen = 0 if self._cache is None else input_ids.shape[1] - 1
        padded = {}
        if not bool(self._mask_RT.all()):
            positions_RT = (mask_RT.cumsum(1) - 1).clamp_min(0)
            padded = {"attention_mask": mask_RT.to(device), "position_ids": positions_RT[:, seen:].to(device)}
        out = teacher(
            input_ids=input_ids[:, seen:].to(device), past_key_values=self._cache, use_cache=True, logits_to_keep=1, **padded
        )  # fmt: skip
        self._cache = out.past_key_values
        return out.logits[:, -1].to(input_ids.device)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


@contextmanager
def _without_habits(model: Any) -> Iterator[None]:
    """Put the model's own generation settings aside: a repetition penalty or top-k would change what is sampled from."""
    from transformers import GenerationConfig

    kept = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = kept


def prompt_of(ids_T: Tensor, scored_T: Tensor, documents_T: Tensor | None, *, prompt_tokens: int) -> Tensor:
    """The beginning of the longest document of a row, which the student is to continue.

    It has `prompt_tokens` tokens, or all that come before the first scored one if they are more (a question is never cut),
    or all but the document's last one if it is shorter. What follows the last scored token of the row is padding.
    """
    scored = scored_T.nonzero().flatten()
    length = int(scored[-1]) + 1 if len(scored) else len(ids_T)
    borders = [0, length]
    if documents_T is not None:
        changes = (documents_T[1:length] != documents_T[: length - 1]).nonzero().flatten() + 1
        borders = [0, *changes.tolist(), length]
    begin, end = max(pairwise(borders), key=lambda span: span[1] - span[0])
    first_scored = int(scored_T[begin + 1 : end].int().argmax()) + 1 if bool(scored_T[begin + 1 : end].any()) else 1
    return ids_T[begin : begin + max(1, min(max(prompt_tokens, first_scored), end - begin - 1))]


def replace_rows(batch: Batch, chosen_B: Tensor, ids_RT: Tensor, mask_RT: Tensor) -> Batch:
    """The batch with rows that the student wrote in the chosen places; each of them is one document."""
    home = batch.input_ids_BT.device
    chosen = chosen_B.to(home)

    def put(values_BT: Tensor, new: Tensor) -> Tensor:
        values_BT = values_BT.clone()
        values_BT[chosen] = new.to(values_BT)
        return values_BT

    count, width = ids_RT.shape
    documents, positions = batch.document_ids_BT, batch.position_ids_BT
    keys = batch.keys or ("",) * len(chosen_B)
    return replace(
        batch,
        input_ids_BT=put(batch.input_ids_BT, ids_RT),
        loss_mask_BT=put(batch.loss_mask_BT, mask_RT),
        document_ids_BT=None if documents is None else put(documents, torch.zeros(count, width)),
        position_ids_BT=None if positions is None else put(positions, torch.arange(width).expand(count, width)),
        keys=tuple(key + _WRITTEN if new else key for key, new in zip(keys, chosen_B.tolist(), strict=True)),
    )


def written_rows(batch: Batch) -> Tensor:
    """Which rows the student wrote, bool [B] on the batch's device."""
    keys = batch.keys or ("",) * len(batch.input_ids_BT)
    return torch.tensor([key.endswith(_WRITTEN) for key in keys], device=batch.input_ids_BT.device)


def select_rows(batch: Batch, chosen_B: Tensor) -> Batch:
    """Only the chosen rows, in their order."""
    chosen = chosen_B.to(batch.input_ids_BT.device)
    kept = chosen_B.nonzero().flatten().tolist()
    documents, positions, keys, sources = batch.document_ids_BT, batch.position_ids_BT, batch.keys, batch.sources
    return Batch(
        batch.input_ids_BT[chosen], batch.loss_mask_BT[chosen],
        None if documents is None else documents[chosen], None if positions is None else positions[chosen],
        None if keys is None else tuple(keys[row] for row in kept),
        None if sources is None else tuple(sources[row] for row in kept),
    )  # fmt: skip


class ReuseBuffer:
    """The last rows that the student wrote, for learning from them again.

    With several processes each has the rows of all, so that one checkpoint serves every process.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.added = 0
        self._ids_RT = torch.zeros(0, 0, dtype=torch.int32)
        self._mask_RT = torch.zeros(0, 0, dtype=torch.bool)

    def __len__(self) -> int:
        return min(self.added, self.capacity)

    @property
    def is_full(self) -> bool:
        """Whether the oldest row makes way for the next one."""
        return self.added >= self.capacity

    def add(self, ids_BT: Tensor, mask_BT: Tensor, chosen_B: Tensor) -> None:
        """Keep the chosen rows of all processes; the oldest go when there is no more room. All processes must call it."""
        fresh_B = gather_rows(chosen_B.to(ids_BT.device)).cpu()
        ids_RT, mask_RT = (gather_rows(tensor).cpu()[fresh_B] for tensor in (ids_BT, mask_BT))
        if not len(self):
            self._ids_RT = torch.zeros(self.capacity, ids_BT.shape[1], dtype=torch.int32)
            self._mask_RT = torch.zeros(self.capacity, ids_BT.shape[1], dtype=torch.bool)
        for row_T, scored_T in zip(ids_RT, mask_RT, strict=True):
            place = self.added % self.capacity
            self._ids_RT[place], self._mask_RT[place] = row_T, scored_T
            self.added += 1

    def draw(self, count: int) -> tuple[Tensor, Tensor]:
        """Token ids and scored tokens of `count` rows drawn at random, with replacement."""
        chosen = torch.randint(len(self), (count,))
        return self._ids_RT[chosen].long(), self._mask_RT[chosen]

    def state_tensors(self) -> dict[str, Tensor]:
        """All that is remembered."""
        kept = len(self)
        return {
            "buffer.ids": self._ids_RT[:kept],
            "buffer.scored": self._mask_RT[:kept],
            "buffer.added": torch.tensor(self.added),
        }

    def load_state_tensors(self, tensors: dict[str, Tensor]) -> None:
        """Take up what was remembered. Raises: CheckpointError when it was of a buffer of another size."""
        ids_RT, added = tensors["buffer.ids"], int(tensors["buffer.added"])
        if min(added, self.capacity) != len(ids_RT):
            raise CheckpointError(
                f"the checkpoint's reuse buffer holds {len(ids_RT)} of {added} rows, which one of {self.capacity} rows cannot "
                "have. Set on_policy.buffer as it was."
            )
        self.added = added
        if not added:
            return
        room = (0, 0, 0, self.capacity - len(ids_RT))
        self._ids_RT, self._mask_RT = F.pad(ids_RT, room), F.pad(tensors["buffer.scored"], room)


def gather_rows(tensor: Tensor) -> Tensor:
    """The rows of all processes below each other; every process must have equally many."""
    if world_size() == 1:
        return tensor
    # Not every backend can send booleans.
    sent = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.contiguous()
    parts = [torch.empty_like(sent) for _ in range(world_size())]
    torch.distributed.all_gather(parts, sent)
    return torch.cat(parts).to(tensor.dtype)
