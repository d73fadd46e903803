"""Every objective as slow loops over tokens, on probabilities in float64: obviously right, and differentiable."""

import math

import torch

TOLERANCE = {"rtol": 1e-10, "atol": 1e-10}


def probabilities(logits, temperature=1.0):
    powers = [(value / temperature).exp() for value in logits]
    total = sum(powers)
    return [power / total for power in powers]


def kl(p, q):
    return sum(a * (a / b).log() for a, b in zip(p, q, strict=True) if a > 0)


def mixed(p, q, share):
    return [share * a + (1 - share) * b for a, b in zip(p, q, strict=True)]


def forward_kl(q, p):
    return kl(p, q)


def reverse_kl(q, p):
    return kl(q, p)


def symmetric_kl(q, p):
    return (kl(q, p) + kl(p, q)) / 2


def jensen_shannon(q, p, beta=0.5):
    m = mixed(p, q, beta)
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def skewed_forward_kl(q, p, alpha=0.1):
    return kl(p, mixed(p, q, alpha))


def skewed_reverse_kl(q, p, alpha=0.1):
    return kl(q, mixed(p, q, 1 - alpha))


def adaptive_kl(q, p, head_share=0.5):
    order = sorted(range(len(p)), key=lambda i: -float(p[i]))
    head, mass = set(), 0.0
    for i in order:
        head.add(i)
        mass += float(p[i])
        if mass >= head_share:
            break
    gaps = [abs(float(a) - float(b)) for a, b in zip(p, q, strict=True)]
    share = sum(gap for i, gap in enumerate(gaps) if i in head) / max(sum(gaps), 1e-300)
    return share * kl(p, q) + (1 - share) * kl(q, p)


def alpha_beta(q, p, alpha=0.2, beta=0.7):
    both = alpha + beta
    inner = sum(a**alpha * b**beta - alpha / both * a**both - beta / both * b**both for a, b in zip(p, q, strict=True))
    return -inner / (alpha * beta)


def total_variation(q, p):
    return sum((a - b).abs() for a, b in zip(p, q, strict=True)) / 2


def sorted_earth_mover(q, p):
    return sum((a - b).abs() for a, b in zip(sorted(p, reverse=True), sorted(q, reverse=True), strict=True))


def logit_mse(q, p):
    gaps = [b.log() - a.log() for a, b in zip(p, q, strict=True)]
    mean = sum(gaps) / len(gaps)
    return sum((gap - mean) ** 2 for gap in gaps) / len(gaps)


def pairs(p, top_k):
    order = sorted(range(len(p)), key=lambda i: -float(p[i]))[:top_k]
    return [(i, j) for i in order for j in order if p[i] > p[j]]


def hinge(q, p, margin=None, top_k=32):
    losses = []
    for i, j in pairs(p, top_k):
        wanted = (p[i] / p[j]).log() if margin is None else margin
        losses.append(torch.relu(wanted - (q[i] / q[j]).log()))
    return sum(losses) / len(losses)


def logistic_ranking(q, p, top_k=32):
    losses = [(1 + q[j] / q[i]).log() for i, j in pairs(p, top_k)]
    return sum(losses) / len(losses)


REFERENCES = {
    function.__name__: function
    for function in (
        forward_kl, reverse_kl, symmetric_kl, jensen_shannon, skewed_forward_kl, skewed_reverse_kl, adaptive_kl, alpha_beta,
        total_variation, sorted_earth_mover, logit_mse, hinge, logistic_ranking,
    )
}  # fmt: skip
# With options other than the defaults, so that an ignored option is seen.
CASES = [
    *((name, {}) for name in REFERENCES),
    ("jensen_shannon", {"beta": 0.9}),
    ("skewed_forward_kl", {"alpha": 0.4}),
    ("skewed_reverse_kl", {"alpha": 0.4}),
    ("adaptive_kl", {"head_share": 0.8}),
    ("alpha_beta", {"alpha": 1.1, "beta": 0.3}),
    ("hinge", {"margin": 0.5, "top_k": 4}),
    ("logistic_ranking", {"top_k": 3}),
]
DIVERGENCES = [name for name in REFERENCES if name not in ("hinge", "logistic_ranking")]
# Student and teacher distributions over three tokens, and what each objective makes of them on paper.
STUDENT_BY_HAND, TEACHER_BY_HAND = [1 / 4, 5 / 8, 1 / 8], [1 / 2, 1 / 4, 1 / 4]
FORWARD_BY_HAND = 0.75 * math.log(2) + 0.25 * math.log(2 / 5)
REVERSE_BY_HAND = 0.625 * math.log(5 / 2) - 0.375 * math.log(2)
BY_HAND = {
    "forward_kl": FORWARD_BY_HAND,
    "reverse_kl": REVERSE_BY_HAND,
    "symmetric_kl": (FORWARD_BY_HAND + REVERSE_BY_HAND) / 2,
    # the mixture is 3/8, 7/16, 3/16
    "jensen_shannon": (0.75 * math.log(4 / 3) + 0.25 * math.log(4 / 7)) / 2
    + (0.375 * math.log(2 / 3) + 0.625 * math.log(10 / 7)) / 2,
    # 0.1 p + 0.9 q = 0.275, 0.5875, 0.1375
    "skewed_forward_kl": 0.75 * math.log(0.5 / 0.275) + 0.25 * math.log(0.25 / 0.5875),
    # 0.9 p + 0.1 q = 0.475, 0.2875, 0.2375
    "skewed_reverse_kl": 0.375 * math.log(0.25 / 0.475) + 0.625 * math.log(0.625 / 0.2875),
    # the head is the first token; it has a third of the differences 1/4, 3/8, 1/8
    "adaptive_kl": FORWARD_BY_HAND / 3 + 2 * REVERSE_BY_HAND / 3,
    "alpha_beta": (
        2 / 9 * (0.5**0.9 + 2 * 0.25**0.9)
        + 7 / 9 * (0.25**0.9 + 0.625**0.9 + 0.125**0.9)
        - (0.5**0.2 * 0.25**0.7 + 0.25**0.2 * 0.625**0.7 + 0.25**0.2 * 0.125**0.7)
    )
    / 0.14,
    "total_variation": 3 / 8,
    # sorted: 1/2, 1/4, 1/4 and 5/8, 1/4, 1/8
    "sorted_earth_mover": 1 / 4,
    # log q - log p = -log 2, log 5/2, -log 2: two alike, one log 5 above
    "logit_mse": 2 / 9 * math.log(5) ** 2,
    # the teacher leads by log 2 in the pairs (0, 1) and (0, 2), the student by log 2/5 and log 2
    "hinge": math.log(5) / 2,
    "logistic_ranking": (math.log(1 + 5 / 2) + math.log(1 + 1 / 2)) / 2,
}


def slow(name, student, teacher, temperature=1.0, **options):
    """The reference for every row of logits [N, V]."""
    return torch.stack(
        [
            REFERENCES[name](probabilities(s, temperature), probabilities(t, temperature), **options)
            for s, t in zip(student, teacher, strict=True)
        ]
    )
