"""How near a store is to its teacher: some of its rows are scored again and compared with what is decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from limbeck.core.types import DenseTargets, SparseTargets
from limbeck.store.codec import bucket_kl_nats
from limbeck.store.records import RowRecord, make_batch
from limbeck.store.store import TargetStore
from limbeck.teachers.base import TargetSource, Wanted

_ROWS_AT_ONCE = 4
_LOGIT_BYTES = 2**26


def measure_fidelity(
    source: TargetSource, store: TargetStore, *, tokens: int, device: torch.device | str
) -> dict[str, Any]:
    """Score about `tokens` tokens of the store again and say how far its targets are from the teacher's.

    The rows are those with the smallest keys, which are as good as drawn at random and the same every time.
    Returns positions; mean, 99th percentile and largest KL (nats) from the teacher's kept entries and tail to the decoded
    ones; top1_agreement; mean_mass_kept (the teacher's probability of the kept entries); mean_kept_entries;
    mean_tail_kl_nats: what would still be lacking if the tail were spread evenly over the tokens that were left out
    (the price of truncation, None when the teacher does not give whole distributions); bytes_per_token of all shards.
    """
    rows = [store.row(number) for number in sample_rows(store, tokens=tokens)]
    compared = compare_rows(source, rows, vocabulary_size=store.vocabulary_size or 1, device=device)
    return report_fidelity(compared, store)


def compare_rows(
    source: TargetSource, rows: Sequence[RowRecord], *, vocabulary_size: int, device: torch.device | str
) -> dict[str, np.ndarray]:
    """What `report_fidelity` sums up, for every scored position of some rows: kl, agreement, mass, kept, tail_kl."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in ("kl", "agreement", "mass", "kept", "tail_kl")}
    source.prepare(Wanted(logits=True))
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        some = rows[first : first + _ROWS_AT_ONCE]
        batch = make_batch(some, width=max(len(row.input_ids) for row in some)).to(device)
        with torch.no_grad():
            logits = source.targets(batch).logits
            for number, row in enumerate(some):
                for name, values in _compare(logits, number, row, vocabulary_size).items():
                    found[name].append(values)
    return {name: np.concatenate(values) if values else np.zeros(0) for name, values in found.items()}


def sample_rows(store: TargetStore, *, tokens: int) -> list[int]:
    """Numbers of rows with about so many tokens together, a few at least, in order."""
    average = max(1, store.manifest.tokens // max(len(store), 1))
    count = min(len(store), max(4, -(-tokens // average)))
    return sorted(np.argsort(store.all_keys(), kind="stable")[:count].tolist())


def report_fidelity(joined: dict[str, np.ndarray], store: TargetStore) -> dict[str, Any]:
    """The report of `measure_fidelity` from compared positions."""
    kl = joined["kl"]
    if not len(kl):
        return {"positions": 0}
    tail_kl = joined["tail_kl"]
    return {
        "positions": len(kl),
        "mean_kl_nats": _rounded(kl.mean()),
        "p99_kl_nats": _rounded(np.quantile(kl, 0.99)),
        "max_kl_nats": _rounded(kl.max()),
        "top1_agreement": _rounded(joined["agreement"].mean()),
        "mean_mass_kept": _rounded(joined["mass"].mean()),
        "mean_kept_entries": _rounded(joined["kept"].mean()),
        "mean_tail_kl_nats": _rounded(tail_kl.mean()) if len(tail_kl) else None,
        "bytes_per_token": _rounded(store.manifest.bytes / store.manifest.tokens),
    }


def _rounded(value: Any) -> float:
    return float(f"{float(value):.6g}")


def _compare(logits: Any, number: int, row: RowRecord, vocabulary: int) -> dict[str, np.ndarray]:
    assert row.ids is not None
    assert row.log_probs is not None
    assert row.tail is not None
    said = np.append(np.asarray(row.scored)[1:], False)
    ids, decoded, tail = row.ids[said], row.log_probs[said], row.tail[said]
    places = torch.from_numpy(np.flatnonzero(said))
    if isinstance(logits, DenseTargets):
        true = _from_dense(logits, number, places, ids, vocabulary)
    elif isinstance(logits, SparseTargets):
        true = _from_sparse(logits, number, places, ids)
    else:
        return {}
    log_probs = np.where(ids >= 0, true["log_probs"], -np.inf)
    return {
        "kl": bucket_kl_nats(log_probs, true["tail"], decoded, tail),
        "agreement": ids[:, 0] == true["best"],
        "mass": np.exp(log_probs).sum(axis=1),
        "kept": (ids >= 0).sum(axis=1),
        "tail_kl": true["tail_kl"],
    }


def _from_dense(
    dense: DenseTargets, number: int, places: Tensor, ids: np.ndarray, vocabulary: int
) -> dict[str, np.ndarray]:
    hidden_ND = dense.hidden_BTD[number, places.to(dense.hidden_BTD.device)]
    size = max(1, _LOGIT_BYTES // (8 * vocabulary))
    pieces = [
        _true_of(dense.head(hidden_ND[low : low + size]).double(), torch.from_numpy(ids[low : low + size]))
        for low in range(0, max(len(ids), 1), size)
    ]
    return {name: torch.cat([piece[name] for piece in pieces]).cpu().numpy() for name in pieces[0]}


def _true_of(logits_NV: Tensor, ids_NK: Tensor) -> dict[str, Tensor]:
    ids_NK, log_probs_NV = ids_NK.to(logits_NV.device), logits_NV.log_softmax(dim=-1)
    used = ids_NK >= 0
    at_ids = log_probs_NV.gather(-1, ids_NK.clamp(min=0)).masked_fill(~used, -torch.inf)
    is_kept = torch.zeros_like(log_probs_NV, dtype=torch.bool)
    rows = torch.arange(len(ids_NK), device=ids_NK.device)[:, None].expand_as(ids_NK)
    is_kept[rows[used], ids_NK[used]] = True
    rest_NV = log_probs_NV.masked_fill(is_kept, -torch.inf)
    tail_N = rest_NV.logsumexp(dim=-1)
    left = (~is_kept).sum(dim=-1)
    share = torch.where(left > 0, tail_N - left.clamp(min=1).log(), torch.zeros_like(tail_N))
    probs_NV = rest_NV.exp()
    tail_kl = torch.where(probs_NV > 0, probs_NV * (rest_NV - share[:, None]), 0.0).sum(dim=-1)
    return {"log_probs": at_ids, "tail": tail_N, "best": logits_NV.argmax(dim=-1), "tail_kl": tail_kl}


def _from_sparse(sparse: SparseTargets, number: int, places: Tensor, ids: np.ndarray) -> dict[str, np.ndarray]:
    """The same from a teacher that names some entries only; one it does not name has no probability here."""
    its_ids, its_log_probs, tail = (
        tensor[number].cpu()[places] for tensor in (sparse.ids_BTK, sparse.log_probs_BTK.double(), sparse.tail_log_prob_BT.double())
    )  # fmt: skip
    wanted = torch.from_numpy(ids)
    same = (wanted[:, :, None] == its_ids[:, None, :]) & (wanted >= 0)[:, :, None]
    log_probs = its_log_probs[:, None, :].masked_fill(~same, -torch.inf).amax(dim=-1)
    extra = its_log_probs.masked_fill(same.any(dim=1) | (its_ids < 0), -torch.inf).logsumexp(dim=-1)
    best = its_ids.gather(-1, its_log_probs.argmax(dim=-1, keepdim=True))[:, 0]
    whole = torch.logaddexp(tail, extra)
    return {"log_probs": log_probs.numpy(), "tail": whole.numpy(), "best": best.numpy(), "tail_kl": np.zeros(0)}
