import pytest
import torch
from tests.evaluate.small_models import SENTENCES, build_tokenizer

from limbeck.core.errors import DataError
from limbeck.evaluate.readings import Reading, prompts_of, random_prompt, read_text
from limbeck.models.byte_tokenizer import ByteTokenizer

WORDS = Reading([1, 2, 3, 4], [4, 4, 4, 4])
SYMBOLS = Reading(list(range(10, 20)), [1, 1, 1, 0, 1, 1, 0, 3, 4, 0])


def test_tokens_and_bytes_by_hand():
    assert (WORDS.bytes_per_token, SYMBOLS.bytes_per_token) == (4.0, 1.2)
    assert [SYMBOLS.tokens_of(count) for count in (0, 1, 3, 4, 5, 8, 99)] == [1, 1, 3, 5, 6, 8, 10]


def test_rows_are_spread_and_begin_with_patches():
    assert WORDS.starts(1) == [0]
    assert WORDS.starts(2) == [0, 2]
    assert SYMBOLS.starts(4) == [0, 4, 7, 0]
    prompts = prompts_of([SYMBOLS], 3, 2, batch=4)
    assert prompts[0].ids_BT.tolist() == [
        [10, 11, 12, 13, 14],
        [14, 15, 16, 17, 18],
        [17, 18, 19, 10, 11],
        [10, 11, 12, 13, 14],
    ]


def test_others_read_as_many_bytes_as_the_reference_and_a_short_text_is_repeated():
    words, symbols = prompts_of([WORDS, SYMBOLS], 2, 1, reference=0)
    assert (words.context, symbols.context) == (2, 8)
    words, symbols = prompts_of([WORDS, SYMBOLS], 7, 1, batch=3, reference=0)
    assert (words.context, symbols.context) == (7, 25)
    assert words.ids_BT.shape == (3, 8)
    assert words.ids_BT[0].tolist() == [1, 2, 3, 4] * 2
    assert symbols.ids_BT[0, :12].tolist() == [*range(10, 20), 10, 11]
    again, equal = prompts_of([WORDS, Reading([1, 2, 3, 4], [4, 4, 4, 4])], 3, 1, reference=0)
    assert torch.equal(again.ids_BT, equal.ids_BT)


def test_a_text_is_read_byte_by_byte_and_token_by_token():
    text = " ".join(SENTENCES)
    reading = read_text(build_tokenizer(bos=False), text)
    assert sum(reading.lengths) == len(text)
    symbols = read_text(ByteTokenizer("space", patch_bytes=16), text)
    assert sum(symbols.lengths) == len(text)
    assert len(symbols.ids) > len(text)


def test_a_tokenizer_that_hides_its_bytes_shares_them_out():
    class Lossy:
        def __call__(self, texts, **_):
            return {"input_ids": [[0] * len(text.split()) for text in texts]}

        all_special_ids = ()
        eos_token_id = None

        def get_vocab(self):
            return {"\u0142": 0}

    reading = read_text(Lossy(), "grün blau")
    assert reading.lengths == [5.0, 5.0]
    with pytest.raises(DataError, match="empty"):
        read_text(Lossy(), " ")


def test_random_prompts_are_the_same_each_time_and_differ_by_row():
    prompt = random_prompt(50, 20, 4, batch=2)
    assert prompt.ids_BT.shape == (2, 24)
    assert torch.equal(prompt.ids_BT, random_prompt(50, 20, 4, batch=2).ids_BT)
    assert not torch.equal(prompt.ids_BT[0], prompt.ids_BT[1])
