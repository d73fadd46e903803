"""Whether the terms of a loss get on with each other, and whether the student is still a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

DROWNED_SHARE = 0.02
COLLAPSED_SHARE = 0.1


def gradient_shares(norms: Mapping[str, float]) -> dict[str, float]:
    """Each term's share of the sum of gradient norms (of the weighted terms, over the trained parameters)."""
    total = sum(norms.values())
    return {name: norm / total if total > 0 else 0.0 for name, norm in norms.items()}


def warnings_of(diagnoses: Sequence[Mapping[str, float]]) -> list[str]:
    """What the diagnoses of a stage so far give reason to say, in sentences; nothing after a single one.

    A diagnosis holds `share.<term>` of the gradient norm, `entropy.student` and `entropy.teacher` in nats a token. A term
    with under 2 % of the gradient on average is called drowned; a student whose predictions have by now under a tenth of
    the teacher's entropy is called collapsed. Numbers are left out, so that the same warning is given once.
    """
    if len(diagnoses) < 2:
        return []
    last = diagnoses[-1]
    names = [name.removeprefix("share.") for name in last if name.startswith("share.")]
    shares = {name: fmean(one[f"share.{name}"] for one in diagnoses) for name in names}
    found = []
    for name, share in shares.items():
        if share < DROWNED_SHARE and len(shares) > 1:
            loudest = max(shares, key=lambda other: shares[other])
            found.append(
                f"{name} has almost no part in the gradient: {loudest} drowns it. Raise its weight or lower {loudest}'s."
            )
    student, teacher = last.get("entropy.student"), last.get("entropy.teacher")
    if student is not None and teacher is not None and student < COLLAPSED_SHARE * teacher:
        found.append(
            "the student's predictions have collapsed to near certainty where the teacher's have not. "
            "Lower the learning rate, add a share of forward_kl, or raise the sampling temperature."
        )
    return found
