"""Generation: with a cache as without, in every mode that transformers offers."""

import copy

import pytest
import torch
import transformers
from packaging.version import Version
from tests.models.families import FAMILIES, tiny_teacher, token_ids
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from limbeck.models.hybrid import HybridForCausalLM, build_student

LAYOUTS = [["hyena", "hyena"], ["attention", "hyena"], ["hyena", "attention"]]
NEW = 10


def tiny_student(family: str, mixers: list[str] | None = None, **hyena: object) -> HybridForCausalLM:
    torch.manual_seed(3)
    return build_student(tiny_teacher(family), mixers=mixers or ["hyena", "attention"], hyena=hyena)


@pytest.mark.parametrize("mixers", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_step_by_step_gives_the_parallel_logits(family, mixers):
    """Also past the sliding window, which is 6 tokens here."""
    student, ids_BT = tiny_student(family, mixers), token_ids(2, 14)
    with torch.no_grad():
        whole = student(ids_BT, use_cache=False).logits
        cache, found = None, []
        for piece in ids_BT.split([3, 1, 1, 4, 1, 1, 1, 1, 1], dim=1):
            out = student(piece, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=1e-4, rtol=1e-4)
    assert cache.get_seq_length() == 14


@pytest.mark.parametrize("mixers", LAYOUTS, ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_with_and_without_cache(family, mixers):
    student, ids_BT = tiny_student(family, mixers), token_ids(2, 5)
    cached = student.generate(ids_BT, max_new_tokens=NEW, do_sample=False)
    assert cached.tolist() == student.generate(ids_BT, max_new_tokens=NEW, do_sample=False, use_cache=False).tolist()


@pytest.mark.parametrize("mixers", LAYOUTS[:2], ids="+".join)
@pytest.mark.parametrize("family", FAMILIES)
def test_left_padded_rows_are_as_if_alone(family, mixers):
    student = tiny_student(family, mixers)
    short, long = token_ids(1, 4, seed=1), token_ids(1, 7, seed=2)
    batch = torch.cat([torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1), long])
    mask = torch.ones_like(batch)
    mask[0, :3] = 0
    together = student.generate(batch, attention_mask=mask, max_new_tokens=6, do_sample=False)
    for row, ids_BT in ((0, short), (1, long)):
        alone = student.generate(ids_BT, max_new_tokens=6, do_sample=False)
        assert together[row, 7:].tolist() == alone[0, ids_BT.shape[1] :].tolist()
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.no_grad():
        padded = student(batch, attention_mask=mask, position_ids=positions, use_cache=False).logits
        torch.testing.assert_close(padded[:1, 3:], student(short).logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "hyena",
    [{"filter": "explicit", "filter_options": {"filter_length": 4}}, {"filter": "implicit"}, {"order": 3}],
    ids=str,
)
def test_other_filters_and_orders(hyena):
    student, ids_BT = tiny_student("llama", **hyena), token_ids(2, 5)
    cached = student.generate(ids_BT, max_new_tokens=NEW, do_sample=False)
    assert cached.tolist() == student.generate(ids_BT, max_new_tokens=NEW, do_sample=False, use_cache=False).tolist()


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 2, "num_return_sequences": 2, "do_sample": False, "length_penalty": 0.5},
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": True, "num_return_sequences": 3},
    ],
    ids=lambda options: "-".join(options),
)
def test_beams_and_sampling_with_and_without_cache(family, options):
    student, ids_BT = tiny_student(family), token_ids(2, 5)
    found = []
    for use_cache in (True, False):
        torch.manual_seed(7)
        found.append(student.generate(ids_BT, max_new_tokens=NEW, use_cache=use_cache, **options).tolist())
    assert found[0] == found[1]


# transformers 5.17 fails at assisted decoding with sliding windows, with or without Hyena; 5.23 does not.
SLIDES = pytest.mark.skipif(Version(transformers.__version__) < Version("5.23"), reason="transformers < 5.23")


@pytest.mark.parametrize("family", ["llama", "gpt_neox", pytest.param("gemma3_text", marks=SLIDES)])
@pytest.mark.parametrize("mixers", LAYOUTS[:2], ids="+".join)
def test_assisted_decoding_and_prompt_lookup_give_the_greedy_text(family, mixers):
    student = tiny_student(family, mixers)
    ids_BT = token_ids(1, 6).repeat(1, 2)
    plain = student.generate(ids_BT, max_new_tokens=16, do_sample=False).tolist()
    assert student.generate(ids_BT, max_new_tokens=16, do_sample=False, prompt_lookup_num_tokens=3).tolist() == plain
    teacher = tiny_teacher(family)
    assert student.generate(ids_BT, max_new_tokens=16, do_sample=False, assistant_model=teacher).tolist() == plain
    helper = build_student(teacher, mixers=["attention", "hyena"], hyena={})
    assert student.generate(ids_BT, max_new_tokens=16, do_sample=False, assistant_model=helper).tolist() == plain
    taught = teacher.generate(ids_BT, max_new_tokens=16, do_sample=False).tolist()
    assert teacher.generate(ids_BT, max_new_tokens=16, do_sample=False, assistant_model=student).tolist() == taught


@pytest.mark.parametrize("family", ["llama", "mistral", "gpt2"])
def test_the_prompt_may_be_read_in_chunks(family):
    student, ids_BT = tiny_student(family), token_ids(2, 11)
    plain = student.generate(ids_BT, max_new_tokens=NEW, do_sample=False)
    assert (
        student.generate(ids_BT, max_new_tokens=NEW, do_sample=False, prefill_chunk_size=4).tolist() == plain.tolist()
    )


def test_a_static_cache_is_refused_in_words_and_not_inherited():
    with pytest.raises(ValueError, match="static cache is not possible"):
        tiny_student("llama").generate(token_ids(1, 4), max_new_tokens=2, cache_implementation="static")
    teacher = copy.deepcopy(tiny_teacher("llama"))
    teacher.generation_config.cache_implementation = "static"
    student = build_student(teacher, mixers=["hyena", "attention"], hyena={})
    assert student.generate(token_ids(1, 4), max_new_tokens=2, do_sample=False).shape == (1, 6)


def test_a_conversation_continues_its_cache():
    student, ids_BT = tiny_student("llama"), token_ids(2, 5)
    cache = DynamicCache()
    first = student.generate(ids_BT, max_new_tokens=4, do_sample=False, past_key_values=cache)
    longer = torch.cat([first, token_ids(2, 3, seed=5)], dim=1)
    continued = student.generate(longer, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert continued.tolist() == student.generate(longer, max_new_tokens=4, do_sample=False).tolist()


def test_a_quantised_cache_is_refused_in_words():
    with pytest.raises((ValueError, ImportError), match=r"hyena|quanto"):
        tiny_student("llama").generate(token_ids(1, 4), max_new_tokens=2, cache_implementation="quantized")


class Collector(BaseStreamer):
    """Keeps what a streamer is given."""

    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, value: torch.Tensor) -> None:
        self.tokens += value.flatten().tolist()

    def end(self) -> None:
        self.ended = True


def test_streaming_gives_every_token():
    student, ids_BT = tiny_student("llama"), token_ids(1, 5)
    collector = Collector()
    plain = student.generate(ids_BT, max_new_tokens=NEW, do_sample=False, streamer=collector)
    assert collector.tokens == plain[0].tolist()
    assert collector.ended


def test_scores_are_returned_when_asked():
    student = tiny_student("llama")
    out = student.generate(
        token_ids(1, 5), max_new_tokens=3, do_sample=False, return_dict_in_generate=True, output_logits=True
    )
    assert len(out.logits) == 3
    assert out.past_key_values.get_seq_length() == 7
