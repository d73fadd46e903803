"""Two probes of memory, written here as texts: recall of pairs (MQAR) and a number hidden in filler (passkey).

Both are drawn from a fixed seed, so the items are the same everywhere, and are scored by the same harness as every other
task: the likelihood of each possible answer after the text.
"""

from __future__ import annotations

import random
from typing import Any

from limbeck.evaluate.task_data import Row, TaskItems, rows_sha256

MQAR_PAIRS = (4, 8, 16)
PASSKEY_WORDS = (64, 128, 256, 512)
PASSKEY_DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
SEED = 20_240_517

_RECALL_ITEMS = 200
_QUERIES = 4
_PASSKEY_ITEMS = 100
_NUMBERS = 5
_KEYS = (
    "apple anchor arrow basket beach bell bird boat book bottle bridge brush button camera candle carpet castle chair "
    "cheese church circle clock cloud coat corner cotton desk doctor door dream engine farmer feather fence field finger "
    "flag flower forest friend garden gate glass grass hammer harbor hat honey horse house island jacket"
)
_VALUES = (
    "king knife ladder lake lamp leaf lemon letter lion machine market medal milk mirror money monkey moon morning "
    "mountain mouse nail needle ocean orange oven owner paint paper pearl pencil piano pilot plate pocket potato prince "
    "queen rabbit radio river road rocket roof rope school shadow sheep ship silver soldier spoon stone"
)
_FILLER = (
    "The road runs along the river and over the hill.",
    "A cart stands by the wall and nobody comes for it.",
    "In the evening the wind turns and the leaves fall.",
    "The house has a red door and four small windows.",
    "Birds sit on the roof and wait for the rain to end.",
    "Some people walk home while others stay in the field.",
    "The water is cold and the boats lie near the shore.",
    "It is a quiet day and the shop closes early.",
)


def probe_names() -> tuple[str, ...]:
    """The names of all probes."""
    return (*(f"mqar_{count}" for count in MQAR_PAIRS), *(f"passkey_{words}" for words in PASSKEY_WORDS))


def probe_items(name: str, *, seed: int = SEED) -> TaskItems:
    """The items of a probe: rows of `context`, `choices`, `answer` (the index of the right choice) and how it was made.

    name: `mqar_N` (N pairs of words) or `passkey_N` (about N words of text). The same name and seed give the same rows.
    """
    kind, _, size = name.partition("_")
    draw = random.Random(f"{name} {seed}")
    rows = (_mqar if kind == "mqar" else _passkey)(int(size), draw)
    return TaskItems(
        rows=tuple(rows),
        texts=((),) * len(rows),
        choices=tuple(len(row["choices"]) for row in rows),
        source=f"made with seed {seed}",
        sha256=rows_sha256(rows),
    )


def probe_description(name: str) -> dict[str, Any]:
    """The words of the probe's lm-eval task, without its data."""
    metrics = ["acc", "exact_match"] if name.startswith("passkey") else ["acc"]
    return {
        "task": name,
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "num_fewshot": 0,
        "metric_list": [{"metric": metric, "aggregation": "mean", "higher_is_better": True} for metric in metrics],
        "metadata": {"version": 1.0},
    }


def _mqar(pairs: int, draw: random.Random) -> list[Row]:
    """Groups of items on the same pairs. Earlier queries stand answered in the text of later ones.

    Each key is asked once, and a value that was given as an answer is no choice any more: whoever cannot tell which
    value belongs to the key has a chance of exactly one in the number of choices.
    """
    rows = []
    queries = min(_QUERIES, pairs - 1)
    for _ in range(-(-_RECALL_ITEMS // queries)):
        keys, values = draw.sample(_KEYS.split(), pairs), draw.sample(_VALUES.split(), pairs)
        lines = [f"{key}: {value}" for key, value in zip(keys, values, strict=True)]
        left = draw.sample(values, pairs)
        for asked, place in enumerate(draw.sample(range(pairs), queries)):
            row = {
                "context": "\n".join([*lines, f"{keys[place]}:"]),
                "choices": list(left),
                "answer": left.index(values[place]),
            }
            rows.append(row | {"pairs": pairs, "query": asked, "place": place})
            lines.append(f"{keys[place]}: {values[place]}")
            left.remove(values[place])
    return rows[:_RECALL_ITEMS]


def _passkey(words: int, draw: random.Random) -> list[Row]:
    """Items of about so many words, the number at every depth in turn."""
    rows = []
    question = "What is the secret number? The secret number is"
    for index in range(_PASSKEY_ITEMS):
        depth = PASSKEY_DEPTHS[index % len(PASSKEY_DEPTHS)]
        numbers = [str(number) for number in draw.sample(range(10_000, 100_000), _NUMBERS)]
        answer = draw.randrange(_NUMBERS)
        said = f"The secret number is {numbers[answer]}. Remember it: {numbers[answer]} is the secret number."
        room = words - len(said.split()) - len(question.split())
        filler: list[str] = []
        while sum(len(sentence.split()) for sentence in filler) < room:
            filler.append(draw.choice(_FILLER))
        filler.insert(round(depth * len(filler)), said)
        row = {"context": " ".join([*filler, question]), "choices": numbers, "answer": answer}
        rows.append(row | {"words": words, "depth": depth})
    return rows
