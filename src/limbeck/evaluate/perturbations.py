"""Text spoiled on purpose, the way people, keyboards and machines spoil it.

Every perturbation is a pure function of text, rate and seed: the same three give the same text anywhere. All but
`raw_bytes` give valid text, so that any tokenizer can be given it.
Source: the kinds follow Belinkov and Bisk 2018 (arXiv:1711.02173, keyboard slips and swaps) and the noised texts of the
BLT and H-Net papers (arXiv:2412.09871, arXiv:2507.07955: dropped characters, random case, capitals); rates and tables are
our own.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from limbeck.core.errors import DataError, unknown_name
from limbeck.core.runtime import derive_seed
from limbeck.models.symbol_streams import text_to_bytes

_PRINTABLE = [chr(code) for code in range(32, 127)]
_KEY_ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
_WORD = re.compile(r"\S+")


@dataclass(frozen=True)
class Perturbation:
    """One way to spoil text.

    apply: text, rate (the probability with which each place is touched) and a generator to the spoilt text.
    rates: of the levels 1, 2, 3. about: what is touched, in a few words.
    """

    apply: Callable[[str, float, random.Random], str]
    rates: tuple[float, float, float]
    about: str


def perturb(text: str, name: str, *, rate: float, seed: int) -> str:
    """`text` spoilt by the perturbation of that name.

    Rate 0 gives the text back. The text of `raw_bytes` may be no valid UTF-8; its broken bytes stand as lone surrogates
    (Python's surrogateescape), which `text_to_bytes` turns back.

    Raises: DataError for an unknown name or a rate outside 0..1.
    """
    if name not in PERTURBATIONS:
        raise DataError(unknown_name("perturbation", name, PERTURBATIONS))
    if not 0 <= rate <= 1:
        raise DataError(f'perturbation "{name}": the rate is {rate}; expected a probability between 0 and 1.')
    chance = random.Random(derive_seed(seed, "perturbation", name, hashlib.sha256(text_to_bytes(text)).hexdigest()))
    return PERTURBATIONS[name].apply(text, rate, chance)


def _each_character(
    change: Callable[[str, random.Random], str], is_touched: Callable[[str], bool]
) -> Callable[[str, float, random.Random], str]:
    """Change each character of a kind with the given probability."""

    def apply(text: str, rate: float, chance: random.Random) -> str:
        return "".join(change(one, chance) if is_touched(one) and chance.random() < rate else one for one in text)

    return apply


def _each_word(change: Callable[[str], str]) -> Callable[[str, float, random.Random], str]:
    """Change each run of characters that are no white space with the given probability."""

    def apply(text: str, rate: float, chance: random.Random) -> str:
        return _WORD.sub(lambda found: change(found[0]) if chance.random() < rate else found[0], text)

    return apply


def _another_printable(one: str, chance: random.Random) -> str:
    drawn = chance.choice(_PRINTABLE)
    while drawn == one:
        drawn = chance.choice(_PRINTABLE)
    return drawn


def _raw_bytes(text: str, rate: float, chance: random.Random) -> str:
    """Each byte becomes any other one with the given probability."""
    spoilt = bytes(
        (byte + chance.randrange(1, 256)) % 256 if chance.random() < rate else byte for byte in text_to_bytes(text)
    )
    return spoilt.decode("utf-8", errors="surrogateescape")


def _neighbours() -> dict[str, str]:
    """The keys around each letter of an English keyboard: left, right, above and below."""
    found: dict[str, str] = {}
    for number, row in enumerate(_KEY_ROWS):
        for place, key in enumerate(row):
            around = [row[place - 1 : place], row[place + 1 : place + 2]]
            if number > 0:
                around.append(_KEY_ROWS[number - 1][place : place + 2])
            if number + 1 < len(_KEY_ROWS):
                around.append(_KEY_ROWS[number + 1][max(0, place - 1) : place + 1])
            found[key] = "".join(around)
    return found | {key.upper(): keys.upper() for key, keys in found.items()}


_NEIGHBOURS = _neighbours()


def _typos(text: str, rate: float, chance: random.Random) -> str:
    """Each letter of the keyboard is, with the given probability, hit beside, swapped with the next, doubled or missed."""
    typed: list[str] = []
    place = 0
    while place < len(text):
        one, after = text[place], text[place + 1 : place + 2]
        place += 1
        if one not in _NEIGHBOURS or chance.random() >= rate:
            typed.append(one)
            continue
        slip = chance.randrange(4)
        if slip == 0:
            typed.append(chance.choice(_NEIGHBOURS[one]))
        elif slip == 1 and after.isalpha():
            typed += [after, one]
            place += 1
        elif slip == 2:
            typed += [one, one]
    return "".join(typed)


_LOOK_ALIKES = dict(zip("aceijopsxyABCEHIJKMOPSTXY", "асеіјорѕхуАВСЕНІЈКМОРЅТХУ", strict=True))
_CYRILLIC = {
    "shch": "щ", "sh": "ш", "ch": "ч", "zh": "ж", "kh": "х", "ts": "ц", "ya": "я", "yu": "ю", "yo": "ё", "x": "кс",
} | dict(zip("abcdefghijklmnopqrstuvwyz", "абкдефгхижклмнопкрстуввйз", strict=True))  # fmt: skip
_SYLLABLE = re.compile("|".join(_CYRILLIC), re.IGNORECASE)


def _transliterate(word: str) -> str:
    """A word in Cyrillic letters: combinations such as `sh` first, then letter by letter; case is kept."""

    def letter(found: re.Match[str]) -> str:
        written = _CYRILLIC[found[0].lower()]
        return written.upper() if found[0][0].isupper() else written

    return _SYLLABLE.sub(letter, word)


def _full_width(word: str) -> str:
    return "".join(chr(ord(one) + 0xFEE0) if "!" <= one <= "~" else one for one in word)


def _other_space(_one: str, chance: random.Random) -> str:
    return chance.choice(("", "  ", "\t", "\n"))


_NOISE, _SHARE, _WORDS = (0.01, 0.05, 0.1), (0.05, 0.2, 0.5), (0.1, 0.5, 1.0)
_substitute = _each_character(_another_printable, str.isascii)
_delete = _each_character(lambda one, chance: "", str.isascii)
_insert = _each_character(lambda one, chance: one + chance.choice(_PRINTABLE), str.isascii)
_swap_case = _each_character(lambda one, chance: one.swapcase(), str.isalpha)
_homoglyphs = _each_character(lambda one, chance: _LOOK_ALIKES[one], _LOOK_ALIKES.__contains__)
_white_space = _each_character(_other_space, " ".__eq__)

PERTURBATIONS = {
    "substitute": Perturbation(_substitute, _NOISE, "ASCII bytes become other printable ones"),
    "delete": Perturbation(_delete, _NOISE, "ASCII bytes are lost"),
    "insert": Perturbation(_insert, _NOISE, "printable ASCII bytes are added"),
    "raw_bytes": Perturbation(_raw_bytes, (0.001, 0.01, 0.05), "bytes become any others; no longer UTF-8"),
    "random_case": Perturbation(_swap_case, _SHARE, "letters change case"),
    "upper": Perturbation(_each_word(str.upper), _WORDS, "words in capitals"),
    "lower": Perturbation(_each_word(str.lower), _WORDS, "words in small letters"),
    "typos": Perturbation(_typos, (0.01, 0.03, 0.1), "keys beside, swapped, doubled or missed"),
    "homoglyphs": Perturbation(_homoglyphs, _SHARE, "Cyrillic letters that look Latin"),
    "cyrillic": Perturbation(_each_word(_transliterate), _WORDS, "words written in Cyrillic"),
    "full_width": Perturbation(_each_word(_full_width), _WORDS, "words in full-width forms"),
    "white_space": Perturbation(_white_space, _SHARE, "spaces lost, doubled, or other white space"),
}
