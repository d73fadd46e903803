import copy

import pytest
import torch
from tests.models.families import tiny_teacher, token_ids
from transformers import DynamicCache, StaticCache

from limbeck.models.cache import HyenaCacheLayer, prepare_cache
from limbeck.models.hybrid import build_student
from limbeck.nn.blockwise import LONG_PROMPT
from limbeck.nn.hyena import HyenaOperator

OPTIONS = {"modal": {}, "explicit": {"filter_length": 5}, "implicit": {}}


def operator(kind: str = "modal") -> HyenaOperator:
    return HyenaOperator(8, filter=kind, filter_options=OPTIONS[kind]).double().eval()


def hidden(rows: int, length: int) -> torch.Tensor:
    return torch.randn(rows, length, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def feed(layer: HyenaCacheLayer, op: HyenaOperator, pieces: list[torch.Tensor]) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([layer.advance(op, piece) for piece in pieces], dim=1)


def test_the_layer_continues_exactly():
    op, layer, x_BTD = operator(), HyenaCacheLayer(), hidden(2, 12)
    assert (layer.get_seq_length(), layer.get_mask_sizes(3), layer.get_max_length()) == (0, (3, 0), -1)
    found = feed(layer, op, list(x_BTD.split([5, 1, 1, 4, 1], dim=1)))
    torch.testing.assert_close(found, op(x_BTD).detach())
    assert (layer.get_seq_length(), layer.get_mask_sizes(3)) == (12, (15, 0))


@pytest.mark.parametrize("kind", OPTIONS)
@pytest.mark.parametrize("removed", [0, 1, 3, 6])
def test_cropped_tokens_leave_no_trace(kind, removed):
    """Crop into the middle of a call, over several calls, and to the very start of the recording."""
    op, x_BTD = operator(kind), hidden(2, 14)
    layer = HyenaCacheLayer()
    feed(layer, op, [x_BTD[:, :4]])
    layer.activate_past_recording()
    feed(layer, op, [x_BTD[:, 4:8], x_BTD[:, 8:9], x_BTD[:, 9:10]])
    layer.crop(-removed)
    assert layer.get_seq_length() == 10 - removed
    other_BTD = hidden(2, 30)[:, 20:]
    found = feed(layer, op, [other_BTD[:, :1], other_BTD[:, 1:]])
    expected = op(torch.cat([x_BTD[:, : 10 - removed], other_BTD], dim=1))[:, 10 - removed :].detach()
    torch.testing.assert_close(found, expected)


def test_cropping_again_and_again():
    op, x_BTD = operator(), hidden(1, 20)
    layer = HyenaCacheLayer()
    layer.activate_past_recording()
    feed(layer, op, [x_BTD[:, :6]])
    layer.crop(-2)
    feed(layer, op, [x_BTD[:, 4:9]])
    layer.activate_past_recording()
    layer.crop(-3)
    layer.crop(0)
    found = feed(layer, op, [x_BTD[:, 6:]])
    torch.testing.assert_close(found, op(x_BTD)[:, 6:].detach())


def test_padding_is_remembered_when_tokens_are_taken_back():
    op, x_BTD = operator(), hidden(2, 8)
    mask = torch.ones(2, 8, dtype=torch.bool)
    mask[0, :3] = False
    layer = HyenaCacheLayer()
    layer.activate_past_recording()
    with torch.no_grad():
        layer.advance(op, x_BTD[:, :6], mask_BT=mask[:, :6])
        layer.crop(-2)
        found = layer.advance(op, x_BTD[:, 4:], mask_BT=mask[:, 4:])
    torch.testing.assert_close(found, op(x_BTD, mask_BT=mask)[:, 4:].detach())


def test_what_was_not_recorded_cannot_be_taken_back():
    op, layer = operator(), HyenaCacheLayer()
    feed(layer, op, [hidden(1, 4)])
    layer.crop(0)
    with pytest.raises(RuntimeError, match="activate_past_recording"):
        layer.crop(-1)
    layer.activate_past_recording()
    feed(layer, op, [hidden(1, 2)])
    with pytest.raises(RuntimeError, match="only the last 2"):
        layer.crop(-3)
    with pytest.raises(ValueError, match="negative"):
        layer.crop(2)


def test_recording_that_is_switched_off_holds_nothing():
    op, layer = operator(), HyenaCacheLayer()
    layer.activate_past_recording()
    feed(layer, op, [hidden(1, 4)])
    layer.record_past = False
    feed(layer, op, [hidden(1, 1)])
    assert layer._inputs_BTD is None
    assert layer._start is None


@pytest.mark.parametrize("is_recording", [False, True])
def test_rows_are_reordered_selected_and_repeated(is_recording):
    op, x_BTD = operator(), hidden(3, 6)
    whole = op(x_BTD).detach()

    def started() -> HyenaCacheLayer:
        layer = HyenaCacheLayer()
        if is_recording:
            layer.activate_past_recording()
        feed(layer, op, [x_BTD[:, :4]])
        return layer

    changes = {
        "reorder": (lambda layer: layer.reorder_cache(torch.tensor([2, 2, 0])), [2, 2, 0]),
        "select": (lambda layer: layer.batch_select_indices(torch.tensor([True, False, True])), [0, 2]),
        "repeat": (lambda layer: layer.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    }
    for change, rows in changes.values():
        layer = started()
        change(layer)
        if is_recording:
            layer.crop(-1)
            feed(layer, op, [x_BTD[rows, 3:4]])
        torch.testing.assert_close(feed(layer, op, [x_BTD[rows, 4:]]), whole[rows, 4:])


def test_reset_copy_and_offload():
    op, x_BTD = operator(), hidden(1, 6)
    layer = HyenaCacheLayer()
    layer.prefetch()
    layer.reset()
    layer.activate_past_recording()
    feed(layer, op, [x_BTD[:, :3]])
    twin = copy.deepcopy(layer)
    layer.offload()
    layer.prefetch()
    torch.testing.assert_close(feed(layer, op, [x_BTD[:, 3:]]), op(x_BTD)[:, 3:].detach())
    torch.testing.assert_close(feed(twin, op, [x_BTD[:, 3:]]), op(x_BTD)[:, 3:].detach())
    layer.reset()
    assert layer.get_seq_length() == 0
    torch.testing.assert_close(feed(layer, op, [x_BTD]), op(x_BTD).detach())


def test_keys_and_values_have_no_place():
    with pytest.raises(NotImplementedError, match="advance"):
        HyenaCacheLayer().update(torch.zeros(1), torch.zeros(1))


def test_the_config_builds_the_right_layers():
    config = build_student(tiny_teacher("mistral"), mixers=["hyena", "attention"], hyena={}).config
    layers = DynamicCache(config=config).layers
    assert isinstance(layers[0], HyenaCacheLayer)
    assert layers[1].sliding_window == config.sliding_window == 6
    with pytest.raises(ValueError, match="static cache is not possible"):
        StaticCache(config=config, max_cache_len=9)


def test_a_cache_made_without_config_is_filled_and_a_foreign_one_refused():
    student = build_student(tiny_teacher("llama"), mixers=["attention", "hyena"], hyena={})
    empty = DynamicCache()
    assert prepare_cache(empty, student.config) is empty
    assert isinstance(empty.layers[1], HyenaCacheLayer)
    foreign = DynamicCache(config=student.config.backbone)
    with pytest.raises(ValueError, match="layer 1 is a Hyena layer"):
        student(token_ids(1, 3), past_key_values=foreign)


@pytest.mark.parametrize("mixers", [["hyena", "hyena"], ["attention", "hyena"]], ids="+".join)
def test_a_long_prompt_gives_the_logits_of_training_and_a_cache_that_continues(mixers):
    """The last tokens one by one, after a prompt long enough for the route by blocks."""
    student = build_student(tiny_teacher("gpt_neox"), mixers=mixers, hyena={}).double().eval()
    ids_BT = token_ids(1, LONG_PROMPT + 4)
    expected = student(ids_BT, use_cache=False).logits.detach()
    with torch.no_grad():
        torch.testing.assert_close(student(ids_BT, use_cache=False).logits, expected)
        out = student(ids_BT[:, :LONG_PROMPT], use_cache=True)
        found = [out.logits]
        for ids_B1 in ids_BT[:, LONG_PROMPT:].split(1, dim=1):
            out = student(ids_B1, past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected)
