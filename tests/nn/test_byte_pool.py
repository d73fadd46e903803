"""The byte model: against a slow reading, what it sees, that its probabilities add up, in one pass and step by step."""

from itertools import chain

import pytest
import torch
from tests.nn.small_byte_models import TRUNKS, assert_same_logits, rows_of, slow_logits, small_network, stream

from limbeck.core.errors import RecipeError
from limbeck.core.symbols import BOS, EOD, EOP, PAD, SYMBOLS
from limbeck.nn.byte_pool import BytePoolNetwork
from limbeck.nn.byte_pool_settings import BytePoolSettings
from limbeck.nn.patches import read_patches

MODES = [{}, {"mode": "stlm_parallel", "encoder_layers": 2}]


def mode_id(options):
    return options.get("mode", "bytepool")


@pytest.mark.parametrize("options", [{}, {"ngram_rows": 50}, {"prefix_slots": 1, "logit_softcap": None}], ids=str)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_agrees_with_reading_patch_by_patch(trunk, options):
    network = small_network(trunk, **options)
    rows = [stream(30, seed=1)[:30], [BOS, *stream(20, seed=2)], stream(9, seed=3)[2:], [EOD], [EOP, 65], [65]]
    found = network(rows_of(*rows))
    for row, logits in zip(rows, found, strict=True):
        assert_same_logits(logits[: len(row)], slow_logits(network, row))
        assert logits[len(row) :].abs().sum() == 0


def test_gradients_agree_with_reading_patch_by_patch():
    network = small_network("attention", ngram_rows=50)
    rows = [stream(24, seed=5)[:24], [BOS, *stream(12, seed=6)]]
    weights = [torch.randn(len(row), SYMBOLS, dtype=torch.float64) for row in rows]

    def gradients(logits):
        loss = sum((logits_TV.clamp_min(-1e3) * w).sum() for logits_TV, w in zip(logits, weights, strict=True))
        return torch.autograd.grad(loss, list(network.parameters()))

    packed = network(rows_of(*rows))
    found = gradients([logits[: len(row)] for logits, row in zip(packed, rows, strict=True)])
    expected = gradients([slow_logits(network, row) for row in rows])
    for (name, _), one, other in zip(network.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10, rtol=1e-10, msg=name)


@pytest.mark.parametrize("options", MODES, ids=mode_id)
@pytest.mark.parametrize("trunk", ["attention", "hyena"])
def test_changing_a_symbol_changes_nothing_before_it(trunk, options):
    network = small_network(trunk, ngram_rows=20, **options)
    row = stream(26, seed=7, end_share=0.0)
    ids = torch.tensor([row])
    before = network(ids)
    for t, symbol in enumerate(row):
        if symbol == EOP:
            continue
        changed = ids.clone()
        changed[0, t] = (symbol + 1) % 256
        after = network(changed)
        torch.testing.assert_close(after[:, :t], before[:, :t], atol=1e-12, rtol=0)
        reaches_own_patch = options == {} or row[t + 1 :].count(EOP) > 0
        assert not reaches_own_patch or (after[:, t:] - before[:, t:]).abs().max() > 1e-4


def test_a_patch_is_seen_by_all_later_ones_as_a_whole():
    """Every symbol of patch s, the last as the first, reaches the first prediction after it."""
    network = small_network("attention")
    ids = torch.tensor([[1, 2, 3, 4, EOP, 5, EOP]])
    before = network(ids)
    for t in range(4):
        changed = ids.clone()
        changed[0, t] = 9
        after = network(changed)
        assert ((after - before)[0, 4:].abs().amax(-1) > 1e-6).all()


def all_short_patches():
    """Every patch of one and two bytes (P = 3), and the end of the document."""
    pairs = torch.full((256 * 256, 3), EOP)
    pairs[:, :2] = torch.cartesian_prod(torch.arange(256), torch.arange(256))
    singles = torch.full((256, 3), PAD)
    singles[:, 0], singles[:, 1] = torch.arange(256), EOP
    return torch.cat((pairs, singles, torch.tensor([[EOD, PAD, PAD]])))


@pytest.mark.parametrize("options", MODES, ids=mode_id)
def test_the_probabilities_of_all_patches_add_up_to_one(options):
    network = small_network("attention", patch_bytes=3, decoder_layers=1, **options)
    total = 0.0
    with torch.no_grad():
        states, _ = network.patch_states(torch.tensor([[7, EOP, 8, 9, EOP]]))
        for part_NP in all_short_patches().split(4096):
            logits_NPV = network.decode(states[0, 2].expand(len(part_NP), -1), part_NP)
            own_NP = logits_NPV.gather(2, part_NP.unsqueeze(2)).squeeze(2) - logits_NPV.logsumexp(2)
            total += (own_NP * (part_NP != PAD)).sum(1).exp().sum().item()
    assert total == pytest.approx(1.0, abs=1e-10)


@pytest.mark.parametrize("options", MODES, ids=mode_id)
def test_decode_gives_the_predictions_of_one_pass(options):
    network = small_network("attention", **options)
    ids = torch.tensor([[1, 2, EOP, 3, 4, 5, 6, EOP, EOD, 7, 8]])
    logits = network(ids)
    states, layout = network.patch_states(ids)
    assert states.shape == (1, 4, 16)
    paths = torch.tensor([[1, 2, EOP, PAD, PAD], [3, 4, 5, 6, EOP], [EOD, *[PAD] * 4], [7, 8, PAD, PAD, PAD]])
    decoded = network.decode(states[0], paths)
    expected = torch.zeros_like(decoded)
    for number, (first, count) in enumerate([(-1, 3), (2, 5), (7, 1), (8, 2)]):
        for j in range(count):
            if first + j >= 0:
                expected[number, j] = logits[0, first + j]
    expected[0, 0] = decoded[0, 0]
    assert_same_logits(decoded, expected)
    assert layout.state_BT[0, 2] == 1


@pytest.mark.parametrize("options", MODES, ids=mode_id)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_padding_is_neutral(trunk, options):
    network = small_network(trunk, **options)
    rows = [stream(17, seed=8), stream(29, seed=9)]
    alone = [network(torch.tensor([row]))[0] for row in rows]
    left = torch.full((2, 40), PAD)
    right = left.clone()
    masked = torch.randint(0, 256, (2, 40))
    mask = torch.zeros(2, 40, dtype=torch.bool)
    for b, row in enumerate(rows):
        left[b, -len(row) :] = torch.tensor(row)
        right[b, : len(row)] = torch.tensor(row)
        masked[b, 3 : 3 + len(row)] = torch.tensor(row)
        mask[b, 3 : 3 + len(row)] = True
    for found, place in (
        (network(left), lambda row: slice(40 - len(row), 40)), (network(right), lambda row: slice(0, len(row))),
        (network(masked, mask_BT=mask), lambda row: slice(3, 3 + len(row))),
    ):  # fmt: skip
        for b, row in enumerate(rows):
            torch.testing.assert_close(found[b, place(row)], alone[b], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", MODES, ids=mode_id)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_packing_is_neutral(trunk, options):
    network = small_network(trunk, **options)
    parts = [stream(11, seed=1)[:11], [BOS, *stream(8, seed=2)], [EOD], stream(13, seed=3)[1:12]]
    ids = torch.tensor([[*chain.from_iterable(parts)], [*chain.from_iterable(parts[::-1])]])
    sizes = torch.tensor([len(part) for part in parts])
    documents = torch.stack(
        (torch.repeat_interleave(torch.arange(4), sizes), torch.repeat_interleave(torch.arange(4), sizes.flip(0)))
    )
    found = network(ids, document_ids_BT=documents)
    for row, order in ((0, parts), (1, parts[::-1])):
        start = 0
        for part in order:
            expected = network(torch.tensor([part]))[0]
            torch.testing.assert_close(found[row, start : start + len(part)], expected, atol=1e-12, rtol=0)
            start += len(part)


@pytest.mark.parametrize("options", MODES, ids=mode_id)
def test_bos_is_put_in_front_where_it_is_missing(options):
    network = small_network("attention", **options)
    row = stream(20, seed=4)
    with_bos = network(torch.tensor([[BOS, *row]]))
    torch.testing.assert_close(with_bos[:, 1:], network(torch.tensor([row])), atol=1e-12, rtol=0)
    states, _ = network.patch_states(torch.tensor([row]))
    other, _ = network.patch_states(torch.tensor([[BOS, *row]]))
    torch.testing.assert_close(states, other, atol=1e-12, rtol=0)
    begin = network.decode(states[:, 0], torch.tensor([[row[0]]]))
    torch.testing.assert_close(begin[:, 0], with_bos[:, 0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", [*MODES, {"ngram_rows": 30}], ids=str)
@pytest.mark.parametrize("trunk", TRUNKS)
def test_step_by_step_gives_one_pass(trunk, options):
    network = small_network(trunk, **options)
    rows = [stream(25, seed=1)[:25], [BOS, *stream(23, seed=2)][:24], stream(15, seed=3)[1:], [EOP, 1, 2], [7]]
    ids = rows_of(*rows)
    spread = torch.full((len(rows), 60), PAD)
    torch.manual_seed(0)
    places = [torch.randperm(60)[: len(row)].sort().values for row in rows]
    places[0] = torch.arange(35, 60)
    for b, row in enumerate(rows):
        spread[b, places[b]] = torch.tensor(row)
    with torch.no_grad():
        expected = network(ids)
        for pieces in ([60], [1] * 60, [7, 1, 1, 30, 20, 1]):
            state = network.start(len(rows))
            found = torch.cat([network.advance(piece, state) for piece in spread.split(pieces, dim=1)], dim=1)
            for b, row in enumerate(rows):
                torch.testing.assert_close(found[b, places[b]], expected[b, : len(row)], atol=1e-10, rtol=0)


def test_ungrammatical_streams_are_read_alike_too():
    network = small_network("attention")
    rows = [
        [1] * 17, [1, 2, 3, 4, 5, EOP, EOP, 6], [1, EOD, EOD, 2, BOS, 3, EOP, BOS, BOS], [1, 2, 3, 4, EOD, 5],
        [1, 2, 3, 4, BOS],
    ]  # fmt: skip
    ids = rows_of(*rows)
    with torch.no_grad():
        expected = network(ids)
        assert expected.isfinite().all()
        for pieces in ([1] * ids.shape[1], [4, 1, 3, 9]):
            state = network.start(len(rows))
            found = torch.cat([network.advance(piece, state) for piece in ids.split(pieces, dim=1)], dim=1)
            torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_keeping_the_last_logits_only():
    network = small_network("attention")
    ids = rows_of(stream(20, seed=1)[:20], stream(12, seed=2)[:14])
    whole = network(ids)
    for keep in (1, 3, 20, 50):
        torch.testing.assert_close(network(ids, keep=keep), whole[:, -keep:], atol=1e-12, rtol=0)
        state = network.start(2)
        torch.testing.assert_close(network.advance(ids, state, keep=keep), whole[:, -keep:], atol=1e-12, rtol=0)
        kept = network.advance(ids[:, :2], state, keep=keep)
        assert kept.shape == (2, min(keep, 2), SYMBOLS)


@pytest.mark.parametrize("trunk", TRUNKS)
def test_rows_of_a_state_can_be_chosen(trunk):
    network = small_network(trunk)
    ids = rows_of(stream(14, seed=1)[:13], stream(14, seed=2)[:13])
    more = rows_of(stream(8, seed=3), stream(8, seed=4)[:7], stream(8, seed=5))
    with torch.no_grad():
        state = network.start(2)
        network.advance(ids, state)
        chosen = state.select(torch.tensor([1, 0, 1]))
        network.advance(more[:2], state)
        found = network.advance(more, chosen)
        expected = network(torch.cat((ids[[1, 0, 1]], more), dim=1))[:, 13:]
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)


def test_empty_input_is_finite_and_empty():
    network = small_network("attention")
    padding = torch.full((2, 3), PAD)
    assert network(padding).abs().sum() == 0
    state = network.start(2)
    assert network.advance(padding, state).abs().sum() == 0
    assert not state.begun_B.any()
    assert network(torch.zeros(2, 0, dtype=torch.long)).shape == (2, 0, SYMBOLS)
    assert network(torch.zeros(0, 4, dtype=torch.long)).shape == (0, 4, SYMBOLS)


@pytest.mark.parametrize("pool", ["mean", "max", "last", "attention"])
def test_gradients_reach_every_parameter_and_no_future(pool):
    network = small_network("attention", pool=pool, ngram_rows=20)
    ids = torch.tensor([stream(40, seed=2)])
    loss = torch.nn.functional.cross_entropy(network(ids)[0, :-1], ids[0, 1:])
    loss.backward()
    assert [name for name, p in network.named_parameters() if p.grad is None or p.grad.abs().max() == 0] == []


def test_half_precision_has_no_infinities():
    ids = torch.tensor([stream(20, seed=1)])
    for dtype in (torch.float16, torch.bfloat16):
        logits = small_network("attention", dtype=dtype)(ids)
        assert logits.isfinite().all()
        assert logits.softmax(-1)[..., PAD].abs().max() == 0


def test_training_starts_at_the_logarithm_of_the_symbols():
    torch.manual_seed(0)
    network = BytePoolNetwork(
        BytePoolSettings.read({"trunk": {"width": 32, "layers": 2, "heads": 2, "feed_forward": 64}})
    )
    ids = torch.tensor([stream(200, patch_bytes=16, seed=1)])
    loss = torch.nn.functional.cross_entropy(network(ids)[0, :-1], ids[0, 1:])
    assert 5.0 < loss.item() < 5.7


def test_tied_matrix_is_one_tensor_with_one_name():
    names = [name for name, p in small_network().named_parameters() if p.shape[0] == SYMBOLS]
    assert names == ["embedding.symbols.weight"]
    assert not any("output" in name for name in small_network().state_dict())
    assert "output.weight" in small_network(mode="stlm_parallel", encoder_layers=2).state_dict()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pool": "meen"}, 'pool: unknown pool "meen". Did you mean "mean"'),
        ({"mode": "byte_pool"}, 'mode: unknown mode "byte_pool". Did you mean "bytepool"'),
        ({"patch_bytes": 1}, "patch_bytes: must be at least 2"),
        ({"local_heads": 3}, "width 8 is not a multiple of 3 heads"),
        ({"local_widht": 3}, 'Did you mean "local_width"'),
        ({"prefix_slots": 0}, "prefix_slots: must be at least 1"),
        ({"logit_softcap": 0.0}, "logit_softcap: must be more than 0"),
        ({"dropout": 1.0}, "dropout: must be at least 0 and less than 1"),
        ({"ngram_rows": -1}, "ngram_rows: must be at least 0"),
    ],
)
def test_settings_that_do_not_fit(options, message):
    with pytest.raises(RecipeError) as caught:
        small_network(**options)
    assert message in str(caught.value)


def test_settings_survive_json():
    settings = small_network("hyena", pool="max").settings
    assert BytePoolSettings.read(settings.as_dict()) == settings
    with pytest.raises(RecipeError, match="trunk"):
        BytePoolSettings.read({})


def test_operations_are_counted_as_they_run():
    """Against the shapes that linear maps really see on a text whose patches all have four bytes."""
    network = small_network("attention", patch_bytes=9)
    row = [*[1, 2, 3, 4, EOP] * 40]
    seen = []
    for module in network.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda layer, args, _out: seen.append(2 * layer.weight.numel() * args[0].numel() // layer.in_features)
            )
    network(torch.tensor([row]))
    head = 2 * SYMBOLS * 8 * len(row)
    counted = network.flops_per_symbol(len(row), mean_patch_bytes=4) * len(row)
    mixing = 40 * (4 * 16 * (40 + 1) / 2 * 2)
    local_mixing = 40 * (2 * 4 * 4 * 8 * 4 + 2 * 6 * 4 * 8 * (6 + 1) / 2)
    # The virtual first patch makes 41 of the 40.
    assert counted == pytest.approx(sum(seen) + head + mixing + local_mixing, rel=0.03)


def test_layout_of_patch_states_is_that_of_read_patches():
    network = small_network()
    ids = rows_of(stream(20, seed=1), stream(9, seed=2))
    states, layout = network.patch_states(ids)
    again = read_patches(ids, patch_bytes=5)
    torch.testing.assert_close(layout.state_BT, again.state_BT)
    assert states.shape[:2] == again.mask_BS.shape
