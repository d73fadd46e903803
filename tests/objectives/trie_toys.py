"""A toy vocabulary with all that is awkward, and what is true of it, worked out slowly."""

from __future__ import annotations

import math

import torch

from limbeck.core.symbols import EOD, EOP, SYMBOLS

PATCH_BYTES = 5
END = 0
# Nested tokens, two with the same bytes, two longer than a patch (one of which goes on from a token), specials, no text.
PIECES = (
    None, b"a", b"b", b" ", b"ab", b"abc", b"ab", b"b ", b"abca", b"abcab", b"cccccc", b"c", b"\xff\x00", None, b"",
)  # fmt: skip


def log_probs_of(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, len(PIECES), generator=generator, dtype=torch.float64)).log_softmax(-1)


def spelled(token: int) -> bytes | None:
    """The bytes of a token; None for those that stand for none."""
    return None if token == END or not PIECES[token] else PIECES[token]


def masses(probs_V: torch.Tensor) -> dict[bytes, float]:
    """The mass of all tokens that begin with each prefix, b"" included (with the end token's), summed exactly."""
    prefixes = {piece[:n] for piece in PIECES if piece for n in range(len(piece) + 1)}
    found = {}
    for prefix in prefixes:
        parts = [
            float(probs_V[token]) for token in range(len(PIECES)) if (spelled(token) or b"\0\0").startswith(prefix)
        ]
        if prefix == b"":
            parts = [float(probs_V[token]) for token in range(len(PIECES)) if token == END or spelled(token)]
        found[prefix] = math.fsum(parts)
    return found


def conditional(probs_V: torch.Tensor, prefix: bytes, *, may_end: bool = True) -> torch.Tensor:
    """Probabilities [SYMBOLS] of what follows a prefix within its token."""
    mass = masses(probs_V)
    found = torch.zeros(SYMBOLS, dtype=torch.float64)
    for longer, value in mass.items():
        if len(longer) == len(prefix) + 1 and longer.startswith(prefix):
            found[longer[-1]] = value
    if prefix == b"":
        found[EOD] = float(probs_V[END])
    elif may_end:
        found[EOP] = math.fsum(float(probs_V[t]) for t in range(len(PIECES)) if spelled(t) == prefix)
    return found / math.fsum(found.tolist())


def path_of(token: int) -> tuple[int, ...] | None:
    """The symbols of the first patch of a token."""
    if token == END:
        return (EOD,)
    piece = spelled(token)
    return None if piece is None else (*piece[: PATCH_BYTES - 1], EOP)


def path_probs(probs_V: torch.Tensor) -> dict[tuple[int, ...], float]:
    """The probability of each first patch among the tokens that have one."""
    found: dict[tuple[int, ...], float] = {}
    for token in range(len(PIECES)):
        path = path_of(token)
        if path is not None:
            found[path] = found.get(path, 0.0) + float(probs_V[token])
    total = math.fsum(found.values())
    return {path: value / total for path, value in found.items()}
