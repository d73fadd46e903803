"""Windows of one tokenizer read by a teacher with another: what the teacher is shown, and where both can be compared.

A row of the student's tokens is cut where documents change and at special tokens; each stretch between is text. The
teacher reads the same text in its own tokens, document by document and from the window's start on, as the student
does. Borders are compared in bytes, so that a window may begin inside a document and inside a character. The symbol
that ends a patch of bytes has no length and lies in the chunk of the byte before it.

Special tokens are never text. In the midst of a document the end-of-text token becomes the teacher's own, others
the teacher's token of the same name; where the teacher has none, its document ends and the next text begins a new
one. The special tokens that the teacher's tokenizer writes before a text stand before every document.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import TeacherError
from limbeck.core.types import AlignedText, Batch
from limbeck.models.borders import Offsets, meet, offsets_in_text, settled_until
from limbeck.models.documents import document_positions
from limbeck.models.token_bytes import TokenBytes, encode_text, leading_special_tokens


@dataclass(frozen=True)
class Alignment:
    """What the teacher has to read, and how its tokens lie to the student's.

    teacher_batch: rows [B, U] of the teacher's tokens, padded at the end; its loss mask is True for the tokens whose
    log-probability is wanted. Documents in a row are packed as the student's are. student_chunk_BT, teacher_chunk_BU:
    number of the chunk of each token, -1 for none. chunk_mask_BC: True where a chunk exists.
    student_position_BP, teacher_position_BP: the last token of each model before a common border after which the
    student's prediction is scored; -1 in unused places.
    """

    teacher_batch: Batch
    student_chunk_BT: Tensor
    teacher_chunk_BU: Tensor
    chunk_mask_BC: Tensor
    student_position_BP: Tensor
    teacher_position_BP: Tensor

    def finish(
        self, teacher_token_log_prob_BU: Tensor, teacher_border_sorted_probs_BPK: Tensor | None = None
    ) -> AlignedText:
        """The targets, once the teacher has read its rows.

        teacher_token_log_prob_BU: log-probability in nats of each token of `teacher_batch` given those before it, with
        anything where its loss mask is False. teacher_border_sorted_probs_BPK: the K largest probabilities, descending,
        that the teacher gives after each `teacher_position_BP`; None when nobody asks for them.

        Raises: TeacherError when a log-probability that is needed is not a number.
        """
        needed_BU = self.teacher_chunk_BU >= 0
        values_BU = torch.where(needed_BU, teacher_token_log_prob_BU, 0.0)
        if not bool(torch.isfinite(values_BU).all()):
            raise TeacherError(
                "the teacher gave a log-probability that is not a finite number for a token of the text. Its weights are "
                "damaged or its number format overflows; try teacher.dtype: float32."
            )
        count = self.chunk_mask_BC.shape[1]
        sums_BC = values_BU.new_zeros(values_BU.shape[0], count + 1)
        sums_BC.scatter_add_(1, torch.where(needed_BU, self.teacher_chunk_BU, count), values_BU)
        return AlignedText(
            self.student_chunk_BT, sums_BC[:, :count], self.chunk_mask_BC,
            None if teacher_border_sorted_probs_BPK is None else self.student_position_BP, teacher_border_sorted_probs_BPK,
        )  # fmt: skip

    @property
    def covered(self) -> int:
        """How many of the student's tokens lie in a chunk."""
        return int((self.student_chunk_BT >= 0).sum())


def align_batch(
    batch: Batch, student: TokenBytes, teacher_tokenizer: Any, teacher: TokenBytes, *, limit_tokens: int | None = None
) -> Alignment:
    """Prepare rows of the student's tokens for a teacher that has other tokens.

    student, teacher: from `read_token_bytes`. limit_tokens: most tokens that the teacher can read in one document; text
    after that is in no chunk.

    A chunk lies between two neighbouring common borders, and only where the batch's loss mask scores every student
    token in it and the teacher has something to predict every one of its tokens from. Bytes that are not UTF-8 end the
    stretch that the teacher sees. The last word of a row that is cut by the window's end is in no chunk.
    """
    rows = [
        _Row(scored, stretches)
        for scored, stretches in zip(
            batch.loss_mask_BT.cpu().numpy().astype(bool), read_stretches(batch, student), strict=True
        )
    ]
    texts = [stretch for row in rows for stretch in row.stretches if stretch.text]
    for stretch, ids in zip(texts, encode_text(teacher_tokenizer, [s.text for s in texts]), strict=True):
        stretch.teacher_ids = np.asarray(ids, dtype=np.int64)
    reader = _Reader.of(teacher_tokenizer, teacher, student, limit_tokens)
    return _to_tensors(batch, [_TeacherRow(row, reader) for row in rows], padding=teacher.end_id or 0)


@dataclass
class Stretch:
    """Tokens low to high (exclusive) of a row that stand for text, or that are special.

    text: what they stand for, less a character that began before the window and whatever follows bytes that are no
    UTF-8 (is_broken). offsets: where the tokens end in it; None for special tokens. settled: up to which byte other
    tokenizers' borders are final. specials: the special tokens. teacher_ids: the text in the teacher's tokens.
    """

    low: int
    high: int
    begins_document: bool
    text: str = ""
    offsets: Offsets | None = None
    settled: int = 0
    is_broken: bool = False
    specials: list[int] = field(default_factory=list)
    teacher_ids: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=np.int64))


@dataclass
class _Row:
    scored: np.ndarray
    stretches: list[Stretch]


def read_stretches(batch: Batch, student: TokenBytes) -> list[list[Stretch]]:
    """The stretches of text and of special tokens in each row, in order. Documents are never in one stretch."""
    ids_BT = batch.input_ids_BT.cpu().numpy()
    documents = batch.document_ids_BT
    documents_BT = np.zeros_like(ids_BT) if documents is None else documents.cpu().numpy()
    return [list(_stretches(ids, in_document, student)) for ids, in_document in zip(ids_BT, documents_BT, strict=True)]


def _stretches(ids: np.ndarray, documents: np.ndarray, student: TokenBytes) -> Iterator[Stretch]:
    known = len(student.pieces)
    is_text = np.where(ids < known, student.is_text[np.minimum(ids, known - 1)], False)
    begins_document = np.append(True, documents[1:] != documents[:-1])
    begins = np.flatnonzero(begins_document | np.append(True, is_text[1:] != is_text[:-1]))
    opens_text = False
    for low, high in zip(begins.tolist(), [*begins[1:].tolist(), len(ids)], strict=True):
        stretch = Stretch(low, high, bool(begins_document[low]))
        if is_text[low]:
            # The text of the row's first token may have begun before the window, unless a special token says otherwise.
            opens_text |= stretch.begins_document and low > 0
            drops_space = student.adds_space and opens_text
            _read_text(stretch, ids[low:high], student, is_closed=high < len(ids), drops_space=drops_space)
            opens_text = False
        else:
            stretch.specials = ids[low:high].tolist()
            opens_text |= stretch.begins_document
        yield stretch


def _read_text(stretch: Stretch, ids: np.ndarray, student: TokenBytes, *, is_closed: bool, drops_space: bool) -> None:
    """Set the text that these tokens stand for, and where they end in it.

    Bytes of a character that began before the window are left out; so is everything from the first byte on that is no
    UTF-8. drops_space: the first space is the tokenizer's own.
    """
    data = student.join(ids.tolist())
    own_space = skipped = int(drops_space and data.startswith(b" "))
    while skipped < min(3, len(data)) and data[skipped] & 0xC0 == 0x80:
        skipped += 1
    readable = data[skipped:]
    try:
        stretch.text = readable.decode()
    except UnicodeDecodeError as error:
        stretch.text = readable[: error.start].decode()
        stretch.is_broken = True
    ends = np.cumsum(student.lengths[ids]) - skipped
    stretch.offsets = Offsets(own_space - skipped, ends, np.ones(len(ends), dtype=bool))
    if own_space:
        stretch.offsets = stretch.offsets.behind_own_space()
    stretch.settled = settled_until(stretch.text.encode(), is_closed=is_closed and not stretch.is_broken)


@dataclass(frozen=True)
class _Reader:
    """How the teacher reads: its tokens, what stands before a text, and its names for the student's special tokens."""

    tokenizer: Any
    tokens: TokenBytes
    opening: list[int]
    counterpart: dict[int, int]
    limit_tokens: int | None

    @classmethod
    def of(cls, tokenizer: Any, tokens: TokenBytes, student: TokenBytes, limit_tokens: int | None) -> _Reader:
        by_name = {name: token for token, name in tokens.special_names.items()}
        counterpart = {token: by_name[name] for token, name in student.special_names.items() if name in by_name}
        if student.end_id is not None and tokens.end_id is not None:
            counterpart[student.end_id] = tokens.end_id
        return cls(tokenizer, tokens, leading_special_tokens(tokenizer), counterpart, limit_tokens)


class _TeacherRow:
    """One row as the teacher reads it, written stretch by stretch."""

    def __init__(self, row: _Row, reader: _Reader):
        self._row, self._reader = row, reader
        self.ids: list[int] = []
        self.documents: list[int] = []
        self.student_chunk = np.full(len(row.scored), -1, dtype=np.int64)
        self.teacher_chunk: list[int] = []
        self.chunks = 0
        self.student_position: list[int] = []
        self.teacher_position: list[int] = []
        self._document, self._begins_at, self._has_text = -1, 0, False
        must_begin = True
        for stretch in row.stretches:
            if must_begin or stretch.begins_document:
                self._begin_document()
            if stretch.offsets is not None:
                self._write_text(stretch, stretch.offsets)
                must_begin = stretch.is_broken
            else:
                must_begin = not self._write_specials(stretch.specials)

    def _begin_document(self) -> None:
        self._document, self._begins_at, self._has_text = self._document + 1, len(self.ids), False
        self._write(self._reader.opening)

    def _write(self, ids: list[int]) -> int:
        """Add tokens to the document as far as the teacher can read, and say how many were added."""
        limit = self._reader.limit_tokens
        room = len(ids) if limit is None else max(0, limit - (len(self.ids) - self._begins_at))
        taken = ids[:room]
        self.ids += taken
        self.documents += [self._document] * len(taken)
        self.teacher_chunk += [-1] * len(taken)
        return len(taken)

    def _write_specials(self, specials: list[int]) -> bool:
        """Add the teacher's counterparts, and say whether there were any: without, its document is over.

        Special tokens before the first text of a document have theirs in what opens the teacher's document.
        """
        counterparts = [self._reader.counterpart.get(token) for token in specials] if self._has_text else []
        if None in counterparts:
            return False
        self._write([token for token in counterparts if token is not None])
        return True

    def _write_text(self, stretch: Stretch, offsets: Offsets) -> None:
        begin = len(self.ids)
        count = self._write(stretch.teacher_ids.tolist())
        self._has_text = True
        if not count:
            return
        theirs = offsets_in_text(stretch.teacher_ids, stretch.text, self._reader.tokens, self._reader.tokenizer)
        # Unigram models write a special token where its name stands in the text: that is no likelihood of the text.
        predicted = self._reader.tokens.is_text[stretch.teacher_ids[:count]]
        predicted[0] &= begin > self._begins_at
        scored = self._row.scored
        meeting = meet(
            offsets, Offsets(theirs.begin, theirs.ends[:count], theirs.is_border[:count]),
            student_scored=scored[stretch.low : stretch.high], teacher_scored=predicted, until=stretch.settled,
        )  # fmt: skip
        mine = meeting.student_chunk
        self.student_chunk[stretch.low : stretch.high] = np.where(mine >= 0, mine + self.chunks, -1)
        self.teacher_chunk[begin:] = np.where(
            meeting.teacher_chunk >= 0, meeting.teacher_chunk + self.chunks, -1
        ).tolist()
        self.chunks += meeting.chunks
        positions = stretch.low + meeting.student_last
        is_followed = np.append(scored, False)[positions + 1]
        self.student_position += positions[is_followed].tolist()
        self.teacher_position += (begin + meeting.teacher_last)[is_followed].tolist()


def _to_tensors(batch: Batch, rows: list[_TeacherRow], *, padding: int) -> Alignment:
    device = batch.input_ids_BT.device

    def padded(lists: list[list[int]], fill: int) -> Tensor:
        width = max((len(values) for values in lists), default=0)
        table = np.full((len(lists), width), fill, dtype=np.int64)
        for number, values in enumerate(lists):
            table[number, : len(values)] = values
        return torch.from_numpy(table)

    ids_BU = padded([row.ids for row in rows], padding)
    chunk_BU = padded([row.teacher_chunk for row in rows], -1)
    documents_BU = padded([row.documents for row in rows], -1)
    documents_BU = torch.where(documents_BU < 0, documents_BU.amax(dim=1, keepdim=True) + 1, documents_BU)
    is_packed = any(row.documents and row.documents[-1] > 0 for row in rows)
    chunks_B = torch.tensor([row.chunks for row in rows])
    return Alignment(
        Batch(
            ids_BU, chunk_BU >= 0, documents_BU if is_packed else None,
            document_positions(documents_BU) if is_packed else None,
        ).to(device),
        torch.from_numpy(np.stack([row.student_chunk for row in rows])).to(device),
        chunk_BU.to(device),
        (torch.arange(int(chunks_B.max())) < chunks_B.unsqueeze(1)).to(device),
        padded([row.student_position for row in rows], -1).to(device),
        padded([row.teacher_position for row in rows], -1).to(device),
    )  # fmt: skip
