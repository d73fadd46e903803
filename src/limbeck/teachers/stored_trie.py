"""A store of predictions of tokens, for a student that reads bytes in patches which are these tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.errors import StoreError, VocabularyError
from limbeck.core.symbols import EOD
from limbeck.core.types import Batch, SparseTargets, Targets
from limbeck.models.byte_trie import ByteTrie
from limbeck.models.tokenizers import tokenizer_fingerprint
from limbeck.objectives.byte_trie import merge_paths
from limbeck.store.records import RowRecord
from limbeck.teachers.base import TargetSource, Wanted, refuse_missing
from limbeck.teachers.stored_windows import EncodedRow, StoreWindows, Stretch
from limbeck.teachers.trie import nothing_known, require_borders_of


class StoredTriePaths:
    """What a store says at the beginnings of patches, for rows of a `StoreWindows` that reads it as symbols.

    Where a patch begins at the border of a captured token, the tokens kept there are what the patch may be
    (`Targets.patch_tokens`, asked for as `Wanted.aligned`; their ids are rows of `trie.paths_CP`). A token longer than a patch
    counts for all that begin so; special tokens that are not the end of text are left out and the rest scaled up.

    tokenizer: what the store was captured with. byte_tokenizer: that of the windows. paths: most that are handed over.

    Raises: StoreError for windows of another kind or a store of another tokenizer or of sampled targets; VocabularyError when
    patches do not end at this tokenizer's borders.
    """

    def __init__(self, windows: StoreWindows, *, tokenizer: Any, byte_tokenizer: Any, paths: int = 8):
        store = windows.store
        if windows.encode is None or store.manifest.kind != "targets":
            raise StoreError(
                f"{store.folder}: byte_trie is for windows of a store of targets read as bytes in patches; a store captured in "
                "symbols serves forward_kl and every other objective on predictions."
            )
        if store.tokenizer not in (None, tokenizer_fingerprint(tokenizer)):
            raise StoreError(
                f"{store.folder}: captured with another tokenizer than the one given ({store.teacher_name}). Give the store's own."
            )
        if (store.manifest.codec or {}).get("sampled"):
            raise StoreError(
                f"{store.folder}: it holds random draws, which say nothing of the tokens that were not drawn. Capture the "
                "likeliest tokens for byte_trie (capture.targets: top_k)."
            )
        require_borders_of(tokenizer, byte_tokenizer, teacher=self._name(windows))
        self.windows = windows
        self.trie = ByteTrie.of_tokenizer(tokenizer, patch_bytes=byte_tokenizer.patch_bytes)
        self._paths = paths

    @staticmethod
    def _name(windows: StoreWindows) -> str:
        return f"{windows.store.teacher_name} (stored)"

    @property
    def name(self) -> str:
        """The stored teacher's name."""
        return self._name(self.windows)

    @property
    def vocabulary_size(self) -> int | None:
        """None: it gives no logits of symbols."""
        return None

    def prepare(self, wanted: Wanted) -> None:
        """Raises: TeacherError when more is wanted than patches, asked for as `aligned`."""
        refuse_missing(
            wanted, source=self.name, offers=("aligned",),
            advice="A store of tokens can be learnt from with byte_trie. For other objectives on predictions capture with this "
            "recipe's tokenizer, which stores symbols.",
        )  # fmt: skip

    def targets(self, batch: Batch) -> Targets:
        """The tokens that the store keeps where the batch's patches begin, on its device.

        Raises: StoreError for rows that are not the store's; VocabularyError for rows that the windows did not encode.
        """
        store = self.windows.store
        numbers = store.find(batch.keys or ())
        if batch.keys is None or (numbers < 0).any():
            raise StoreError(
                f"{store.folder}: the batch holds rows that are not of this store. Train on the store's own rows."
            )
        shape = tuple(batch.input_ids_BT.shape)
        flat = nothing_known((batch.input_ids_BT.numel(),), self._paths, torch.float32)
        scored_BT = batch.loss_mask_BT.cpu().numpy()
        encoded_rows = self.windows.encode_rows(numbers.tolist())
        for row, (number, encoded) in enumerate(zip(numbers, encoded_rows, strict=True)):
            if batch.input_ids_BT[row, : len(encoded.ids)].tolist() != encoded.ids:
                raise VocabularyError(
                    f"{store.folder}: a row of the batch was encoded by another tokenizer than the windows'."
                )
            record = store.row(int(number))
            place, said = _match(encoded, record)
            is_scored = scored_BT[row, place + 1]
            self._add(flat, torch.from_numpy(row * shape[1] + place[is_scored]), record, said[is_scored])
        parts = (flat.ids_BTK, flat.log_probs_BTK, flat.tail_log_prob_BT)
        return Targets(
            patch_tokens=SparseTargets(*(part.unflatten(0, shape).to(batch.input_ids_BT.device) for part in parts))
        )

    def _add(self, flat: SparseTargets, place_n: Tensor, record: RowRecord, said_n: np.ndarray) -> None:
        assert record.ids is not None
        assert record.log_probs is not None
        assert record.tail is not None
        ids_nK = self.trie.token_paths(torch.from_numpy(record.ids[said_n].astype(np.int64)))
        ids_nK, log_prob_nK = merge_paths(ids_nK, torch.from_numpy(record.log_probs[said_n]))
        tail_n1 = torch.from_numpy(record.tail[said_n])[:, None].float()
        total_n1 = torch.cat((log_prob_nK, tail_n1), dim=1).logsumexp(dim=1, keepdim=True)
        kept = min(self._paths, ids_nK.shape[1])
        tail_n = torch.cat((log_prob_nK[:, kept:], tail_n1), dim=1).logsumexp(dim=1)
        flat.ids_BTK[place_n, :kept] = ids_nK[:, :kept]
        flat.log_probs_BTK[place_n, :kept] = log_prob_nK[:, :kept] - total_n1
        flat.tail_log_prob_BT[place_n] = tail_n - total_n1[:, 0]


def _match(encoded: EncodedRow, record: RowRecord) -> tuple[np.ndarray, np.ndarray]:
    """Positions of the student after which a patch begins where a token does, and the captured positions that predict it."""
    places, sources = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for stretch, low, high in encoded.parts:
        symbols = np.asarray(encoded.ids[low:high], dtype=np.int64)
        is_byte = symbols < 256
        before: np.ndarray = np.cumsum(is_byte) - is_byte
        begins = np.flatnonzero(is_byte & ~np.append(False, is_byte)[:-1])
        tokens, starts = _token_starts(record, stretch)
        _, mine, theirs = np.intersect1d(before[begins], starts, assume_unique=True, return_indices=True)
        places.append(low + begins[mine] - 1)
        sources.append(tokens[theirs] - 1)
        if stretch.closed and high < len(encoded.ids) and encoded.ids[high] == EOD:
            places.append(np.asarray([high - 1]))
            sources.append(np.asarray([stretch.end_token - 2]))
    place, source = np.concatenate(places), np.concatenate(sources)
    is_told = (place >= 0) & (source >= 0)
    return place[is_told], source[is_told]


def _token_starts(record: RowRecord, stretch: Stretch) -> tuple[np.ndarray, np.ndarray]:
    """The captured tokens of a stretch that stand for text, and where they begin in it, as far as its text is the bytes."""
    assert record.text is not None
    lengths = np.asarray(record.token_bytes, dtype=np.int64)
    tokens = np.arange(stretch.first_token, stretch.end_token)
    ends = np.cumsum(lengths[tokens]) - stretch.skipped_bytes
    starts = ends - lengths[tokens]
    data = stretch.text.encode()
    begins = int(lengths[: stretch.first_token].sum()) + stretch.skipped_bytes
    captured = np.frombuffer(record.text[begins : begins + len(data)], np.uint8)
    same = captured == np.frombuffer(data, np.uint8)[: len(captured)]
    until = len(same) if same.all() else int(same.argmin())
    is_usable = (lengths[tokens] > 0) & (starts >= 0) & (starts < until)
    return tokens[is_usable], starts[is_usable]


_: type[TargetSource] = StoredTriePaths
