"""Was the teacher worth it? The student against the control that had no teacher, with an interval."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Literal

from limbeck.evaluate.facts import TeacherWorth

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table the normal distribution's.
_T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131, 2.120,
    2.110, 2.101, 2.093, 2.086, 2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip


def teacher_worth(
    control: str, differences_nats: Sequence[float], standard_errors: Sequence[float | None]
) -> TeacherWorth:
    """The mean lead of the student over its control in nats per token, with a 95 % interval.

    differences_nats: control minus student, one for each seed, on the same tokens: positive means that the teacher
    helped. standard_errors: of each over blocks of text, used when there is one seed; such an interval knows nothing of
    how training runs differ, and the facts say so. None (a single block) leaves the interval open and the answer unclear.
    With several seeds the interval is Student's t over the seeds.

    Raises: ValueError when there is no difference, or the two lists differ in length.
    """
    count = len(differences_nats)
    if count == 0 or len(standard_errors) != count:
        raise ValueError("one difference and one standard error are needed for every seed")
    mean = statistics.fmean(differences_nats)
    if count == 1:
        half = math.inf if standard_errors[0] is None else 1.96 * standard_errors[0]
    else:
        quantile = _T_QUANTILES[count - 2] if count - 2 < len(_T_QUANTILES) else 1.96
        half = quantile * statistics.stdev(differences_nats) / math.sqrt(count)
    low, high = mean - half, mean + half
    answer: Literal["yes", "no", "unclear"] = "yes" if low > 0 else "no" if high < 0 else "unclear"
    return TeacherWorth(
        control=control, nats=mean, low=low, high=high, seeds=count,
        method="Student's t over seeds" if count > 1 else "blocks of the held-out text, one seed",
        answer=answer,
    )  # fmt: skip
