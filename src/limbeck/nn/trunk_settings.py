"""What a trunk is made of, and which block runs which weights: the menu of weight sharing."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from limbeck.core.errors import RecipeError, unknown_name, unknown_piece
from limbeck.nn.blocks import ACTIVATIONS
from limbeck.nn.mixers import ATTENTION, MIXERS

SHARE_FEED_FORWARD = ("none", "all", "interior")
SHARE_MIXERS = ("none", "output", "all")
_MOST_STEPS = 10_000


@dataclass(frozen=True)
class TrunkSettings:
    """The shape of a trunk.

    width: D. layers: blocks with norms of their own. heads, kv_heads, rope_theta, qk_norm: of attention. feed_forward:
    hidden width. activation: a name in `ACTIVATIONS`. mixers: "attention" or a name in `MIXERS` a layer; None is all
    attention. hyena: options of `HyenaOperator`. mixer_options: those of other mixers, by name. dropout: after each mixer and
    feed-forward.
    residual_scalars: every block starts from r x + s x_0, x_0 being the trunk's input, with learned r = 1 and s = 0 at
    the start (modded-nanogpt and nanochat). zero_init: output projections start at zero, so that every block begins as
    the identity (muP-like; arXiv:1901.09321); otherwise they start 1 / sqrt(2 x blocks run) times as large as others.

    Sharing. share_feed_forward: one feed-forward for "all" layers (arXiv:2402.16840) or for the "interior", all but the
    first and the last. share_mixers: in the interior, attention's "output" projection alone or "all" of a mixer. repeat:
    each block runs so many times in succession (arXiv:2402.14905, section 2.4). loop: (first, last, times), this stretch
    of layers runs so many times over (arXiv:1807.03819). delta_rank: every matrix that is run more than once gets a
    low-rank change for each run of its own, zero at the start (arXiv:2410.20672).

    Raises: RecipeError for what does not fit together.
    """

    width: int
    layers: int
    heads: int
    feed_forward: int
    kv_heads: int | None = None
    activation: str = "relu2"
    mixers: tuple[str, ...] | None = None
    hyena: Mapping[str, Any] = field(default_factory=dict)
    mixer_options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    rope_theta: float | None = 10000.0
    qk_norm: bool = True
    residual_scalars: bool = True
    zero_init: bool = True
    dropout: float = 0.0
    share_feed_forward: str = "none"
    share_mixers: str = "none"
    repeat: int = 1
    loop: tuple[int, int, int] | None = None
    delta_rank: int = 0

    def __post_init__(self) -> None:
        for name in ("mixers", "loop"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, tuple(value))
        object.__setattr__(self, "kv_heads", self.heads if self.kv_heads is None else self.kv_heads)
        object.__setattr__(self, "hyena", dict(self.hyena))
        options = {name: dict(words) for name, words in self.mixer_options.items()}
        object.__setattr__(self, "mixer_options", options)
        self._check_shape()
        self._check_mixers()
        self._check_sharing()

    def _check_shape(self) -> None:
        for name in ("width", "layers", "heads", "feed_forward", "repeat"):
            if getattr(self, name) < 1:
                raise RecipeError(f"trunk.{name}: must be at least 1, not {getattr(self, name)}")
        times = self.loop[2] if self.loop is not None and len(self.loop) == 3 else 1
        if self.layers * self.repeat * max(times, 1) > _MOST_STEPS:
            raise RecipeError(
                f"trunk: {self.layers} layers, repeat {self.repeat} and loop {self.loop} make more than {_MOST_STEPS} steps; that "
                "cannot be right. Give fewer"
            )
        if self.activation not in ACTIVATIONS:
            raise RecipeError("trunk.activation: " + unknown_name("activation", self.activation, ACTIVATIONS))
        if not 0 <= self.dropout < 1:
            raise RecipeError(f"trunk.dropout: must be at least 0 and less than 1, not {self.dropout}")

    def _check_mixers(self) -> None:
        used = set(self.mixers or ())
        for mixer in self.mixers or ():
            if mixer not in (ATTENTION, *MIXERS):
                raise RecipeError("trunk.mixers: " + unknown_piece("mixer", mixer, (ATTENTION, *MIXERS)))
        if self.mixers is not None and len(self.mixers) != self.layers:
            raise RecipeError(
                f"trunk.mixers: {len(self.mixers)} are given for {self.layers} layers; give one for each layer"
            )
        if "hyena" in self.mixer_options:
            raise RecipeError("trunk.mixer_options: the options of hyena are written under trunk.hyena")
        for name in self.mixer_options:
            if name not in used - {ATTENTION, "hyena"}:
                raise RecipeError(f"trunk.mixer_options: {name} is no mixer with options of its own in trunk.mixers")

    def _check_sharing(self) -> None:
        for name, known in (("share_feed_forward", SHARE_FEED_FORWARD), ("share_mixers", SHARE_MIXERS)):
            if getattr(self, name) not in known:
                raise RecipeError(f"trunk.{name}: " + unknown_name("way of sharing", getattr(self, name), known))
        interior = self.share_feed_forward == "interior" or self.share_mixers != "none"
        if interior and self.layers < 4:
            raise RecipeError(
                f"trunk: sharing in the interior (all layers but the first and the last) needs 4 layers, not {self.layers}"
            )
        if self.loop is not None and not (
            len(self.loop) == 3 and 0 <= self.loop[0] <= self.loop[1] < self.layers and self.loop[2] >= 1
        ):
            raise RecipeError(
                f"trunk.loop: expected (first layer, last layer, times) within layers 0 to {self.layers - 1}, "
                f"got {self.loop}"
            )
        if self.delta_rank < 0:
            raise RecipeError(f"trunk.delta_rank: must be at least 0, not {self.delta_rank}")
        plan = plan_steps(self)
        if self.share_mixers != "none" and len({step.output for step in plan}) == self.layers:
            raise RecipeError(
                f'trunk.share_mixers: "{self.share_mixers}" shares nothing here, since no two layers of the interior have '
                "what it shares. Write none, or choose other mixers"
            )
        if self.delta_rank and not _shared(plan):
            raise RecipeError("trunk.delta_rank: nothing is shared, so there is nothing to tell apart; leave it at 0")
        if self.delta_rank and any(self.mixer_of(layer) != ATTENTION for layer in _repeated(plan, lambda s: s.mixer)):
            raise RecipeError(
                "trunk.delta_rank: a mixer of your own or a Hyena operator that runs more than once takes no deltas. Share "
                "attention layers only, or leave it at 0"
            )

    def mixer_of(self, layer: int) -> str:
        """What mixes tokens in a layer: "attention" or a name in `MIXERS`."""
        return ATTENTION if self.mixers is None else self.mixers[layer]

    def options_of(self, mixer: str) -> Mapping[str, Any]:
        """The options of a mixer of `MIXERS`."""
        return self.hyena if mixer == "hyena" else self.mixer_options.get(mixer, {})

    @classmethod
    def read(cls, values: Mapping[str, Any] | TrunkSettings, *, where: str = "trunk") -> TrunkSettings:
        """Settings of a plain mapping, as JSON gives it. Raises: RecipeError for keys that are unknown or missing."""
        if isinstance(values, TrunkSettings):
            return values
        known = {item.name: item for item in dataclasses.fields(cls)}
        for name in values:
            if name not in known:
                raise RecipeError(f"{where}: " + unknown_name("setting", name, known))
        missing = [
            name for name, item in known.items()
            if name not in values and item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        ]  # fmt: skip
        if missing:
            raise RecipeError(f"{where}: {', '.join(missing)} must be given")
        return cls(**values)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain values for JSON."""
        values = dataclasses.asdict(self)
        if not self.mixer_options:
            del values["mixer_options"]
        return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}


@dataclass(frozen=True)
class Step:
    """One run of a block: whose norms, whose mixer, whose attention output projection and whose feed-forward, by layer."""

    layer: int
    mixer: int
    output: int
    feed_forward: int


def plan_steps(settings: TrunkSettings) -> list[Step]:
    """Which block runs when, and with whose weights; a shared part belongs to the first layer that uses it."""
    interior = range(1, settings.layers - 1)

    def first_alike(layer: int) -> int:
        return next(other for other in interior if settings.mixer_of(other) == settings.mixer_of(layer))

    blocks = []
    for layer in range(settings.layers):
        inside = layer in interior
        mixer = first_alike(layer) if inside and settings.share_mixers == "all" else layer
        output = first_alike(layer) if inside and settings.share_mixers != "none" else layer
        if settings.mixer_of(layer) != ATTENTION:
            output = mixer
        feed_forward = layer
        if settings.share_feed_forward == "all":
            feed_forward = 0
        elif settings.share_feed_forward == "interior" and inside:
            feed_forward = interior[0]
        blocks += [Step(layer, mixer, output, feed_forward)] * settings.repeat
    if settings.loop is None:
        return blocks
    first, last, times = settings.loop
    start, stop = first * settings.repeat, (last + 1) * settings.repeat
    return blocks[:start] + blocks[start:stop] * times + blocks[stop:]


def _repeated(plan: list[Step], part: Callable[[Step], int]) -> set[int]:
    used = [part(step) for step in plan]
    return {layer for layer in used if used.count(layer) > 1}


def shared_parts(plan: list[Step]) -> tuple[set[int], set[int], set[int]]:
    """The layers whose mixer, output projection and feed-forward run more than once."""
    return (
        _repeated(plan, lambda step: step.mixer),
        _repeated(plan, lambda step: step.output),
        _repeated(plan, lambda step: step.feed_forward),
    )


def _shared(plan: list[Step]) -> bool:
    return any(shared_parts(plan))
