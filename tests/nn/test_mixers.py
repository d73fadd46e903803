"""A mixer of one's own in a trunk: what holds of attention and Hyena holds of it, and nothing but its class is needed."""

import pytest
import torch
from tests.nn import test_trunk, test_trunk_cache
from tests.nn.test_trunk import BASE, inputs, trunk_of
from torch import nn

from limbeck.core.errors import RecipeError
from limbeck.models.metering import FlopMeter
from limbeck.nn.byte_pool import BytePoolNetwork
from limbeck.nn.byte_pool_settings import BytePoolSettings
from limbeck.nn.compact import CompactNetwork
from limbeck.nn.hyena import HyenaOperator
from limbeck.nn.mixers import MIXERS
from limbeck.nn.packing import each_document
from limbeck.nn.trunk import TrunkCache, TrunkSettings

LAYERS = ["toy", "attention", "hyena", "toy"]
VARIANTS = {
    "alone": {"mixers": ["toy"] * 4},
    "with others": {"mixers": LAYERS, "mixer_options": {"toy": {"decay": 0.3}}},
    "repeat": {"mixers": LAYERS, "repeat": 2},
    "shared": {"mixers": ["attention", "toy", "toy", "attention"], "share_mixers": "all", "loop": [1, 2, 2]},
}
every_variant = pytest.mark.parametrize("options", VARIANTS.values(), ids=VARIANTS)


class Toy(nn.Module):
    """A sum that fades: s <- decay s + W x, and out of it. The state is a tensor."""

    def __init__(self, width, *, decay=0.8):
        super().__init__()
        self.decay = decay
        self.in_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, hidden_BTD, *, document_ids_BT=None):
        if document_ids_BT is not None:
            return each_document(self, hidden_BTD, document_ids_BT)
        lags_TT = torch.arange(hidden_BTD.shape[1])
        lags_TT = lags_TT.unsqueeze(1) - lags_TT
        weights_TT = torch.where(lags_TT >= 0, self.decay ** lags_TT.clamp_min(0).double(), 0.0).to(hidden_BTD.dtype)
        return self.out_proj(torch.tanh(weights_TT @ self.in_proj(hidden_BTD)))

    def init_state(self, batch_size, *, device, dtype):
        return torch.zeros(batch_size, self.out_proj.in_features, device=device, dtype=dtype)

    def advance(self, hidden_BTD, state):
        outputs = []
        for x_BD in self.in_proj(hidden_BTD).unbind(1):
            state = self.decay * state + x_BD
            outputs.append(state)
        return self.out_proj(torch.tanh(torch.stack(outputs, dim=1))), state.detach()

    def flops_per_token(self, context_tokens):
        return 2 * (self.in_proj.weight.numel() + self.out_proj.weight.numel()) + 2 * self.out_proj.in_features


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    monkeypatch.setitem(MIXERS, "toy", Toy)


@every_variant
@pytest.mark.parametrize(
    "check",
    [
        test_trunk.test_the_past_does_not_see_the_future,
        test_trunk.test_padding_anywhere_changes_nothing,
        test_trunk.test_packed_documents_are_alone,
        test_trunk.test_every_tensor_has_one_name_and_state_dicts_come_back,
        test_trunk.test_a_shared_tensor_gets_the_sum_of_the_gradients,
        test_trunk_cache.test_any_split_gives_what_one_pass_gives,
        test_trunk_cache.test_ragged_rows_and_some_rows_only,
        test_trunk_cache.test_rows_can_be_selected_repeated_and_cloned,
        test_trunk_cache.test_gradients_flow_through_the_present_and_not_into_the_past,
    ],
    ids=lambda check: check.__name__.removeprefix("test_"),
)
def test_what_holds_of_every_trunk_holds_with_it(options, check):
    check(options)


def test_each_document_is_what_it_is_alone():
    mixer, x_BTD = Toy(6).double(), torch.randn(3, 11, 6, dtype=torch.float64)
    documents_BT = torch.tensor([[0] * 11, [1] * 4 + [2] * 7, [3, 4, 5, 5, 5, 6, 7, 7, 7, 7, 7]])
    out_BTD = mixer(x_BTD, document_ids_BT=documents_BT)
    for row in range(3):
        for name in documents_BT[row].unique():
            chosen_T = documents_BT[row] == name
            torch.testing.assert_close(out_BTD[row, chosen_T], mixer(x_BTD[row : row + 1, chosen_T])[0])
    influence_BTD = torch.autograd.grad(mixer(x_BTD.requires_grad_(), document_ids_BT=documents_BT)[1, 6].sum(), x_BTD)[
        0
    ]
    assert influence_BTD[1].abs().sum(-1).nonzero().flatten().tolist() == [4, 5, 6]


def test_operations_by_hand_and_those_of_hyena_as_before():
    toy = trunk_of(mixers=["toy"] * 4)
    assert toy.flops_per_position(10) == 4 * (2 * 16 * 16 * 2 + 2 * 16 + 2 * 2 * 16 * 24)
    operator = HyenaOperator(16, inner_width=8, order=3)
    long_convolution = 10 * 7 + 8  # log2(2 x 64) = 7
    assert operator.flops_per_token(64) == 2 * (16 * 32 + 8 * 16) + 8 * (2 * long_convolution + 3 + 2 * 3 * 4)


def test_zero_start_and_scaled_start():
    x_BSD = inputs()
    still = trunk_of(moved=False, zero_init=True, mixers=["toy"] * 4)
    torch.testing.assert_close(still(x_BSD), still.norm(x_BSD), atol=0, rtol=0)
    torch.manual_seed(0)
    alone = Toy(16)
    torch.manual_seed(0)
    inside = trunk_of(moved=False, layers=1, mixers=["toy"]).layers[0].mixer
    torch.testing.assert_close(inside.out_proj.weight, alone.out_proj.weight.double() / 2**0.5)
    torch.testing.assert_close(inside.out_proj.bias, alone.out_proj.bias.double() / 2**0.5)


@torch.no_grad()
def test_crop_says_that_it_cannot():
    trunk = trunk_of(mixers=["toy"] * 4)
    cache = TrunkCache.empty(trunk, 1, "cpu", torch.float64)
    trunk(inputs(1, 5), cache=cache)
    with pytest.raises(ValueError, match="cannot be taken back"):
        cache.crop([3])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"mixers": ["toi"] * 4}, 'unknown mixer "toi". Did you mean "toy".*--plugin FILE.py'),
        ({"mixers": ["toy"] * 4, "mixer_options": {"tiy": {}}}, "mixer_options: tiy is no mixer"),
        ({"mixers": ["toy"] * 4, "mixer_options": {"attention": {}}}, "mixer_options: attention is no mixer"),
        ({"mixers": LAYERS, "mixer_options": {"hyena": {}}}, "written under trunk.hyena"),
        ({"mixers": ["toy"] * 4, "repeat": 2, "delta_rank": 2}, "mixer of your own .* takes no deltas"),
    ],
)
def test_what_does_not_fit_together_is_refused(options, words):
    with pytest.raises(RecipeError, match=words):
        TrunkSettings.read(BASE | options)


def test_options_that_a_mixer_has_not_are_refused(monkeypatch):
    with pytest.raises(RecipeError, match=r"trunk.mixer_options.toy: .*unexpected keyword argument 'dekay'"):
        trunk_of(mixers=["toy"] * 4, mixer_options={"toy": {"dekay": 1}})
    with pytest.raises(RecipeError, match=r"trunk.hyena: .*unexpected keyword argument 'ordr'"):
        trunk_of(mixers=["hyena"] * 4, hyena={"ordr": 3})
    monkeypatch.setitem(MIXERS, "bare", lambda width: nn.Linear(width, width))
    with pytest.raises(RecipeError, match="bare has no out_proj"):
        trunk_of(mixers=["bare"] * 4)


def test_settings_survive_json_and_old_ones_stay_as_they_were():
    settings = TrunkSettings(**BASE | VARIANTS["with others"])
    assert TrunkSettings.read(settings.as_dict()) == settings
    assert settings.as_dict()["mixer_options"] == {"toy": {"decay": 0.3}}
    assert "mixer_options" not in TrunkSettings(**BASE).as_dict()


TRUNK = BASE | {"mixers": LAYERS, "mixer_options": {"toy": {"decay": 0.5}}}


@torch.no_grad()
def test_models_of_tokens_and_of_bytes_read_on_as_they_read_at_once():
    ids_BT = torch.randint(0, 20, (2, 12))
    tokens = CompactNetwork(vocab_size=20, trunk=TRUNK).double().eval()
    cache = TrunkCache.empty(tokens.trunk, 2, "cpu", torch.float64)
    parts = [tokens(part_BT, cache=cache) for part_BT in ids_BT.split([5, 1, 1, 3, 2], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), tokens(ids_BT), atol=1e-9, rtol=1e-9)
    settings = {"local_width": 16, "encoder_layers": 1, "decoder_layers": 1, "patch_bytes": 4, "zero_init": False}
    symbols = BytePoolNetwork(BytePoolSettings.read({"trunk": TRUNK, **settings})).double().eval()
    row_BT = torch.tensor([[257, 65, 66, 259, 67, 259, 68, 69, 70, 259, 71, 72, 259, 73]])
    state = symbols.start(1)
    parts = [symbols.advance(part_BT, state) for part_BT in row_BT.split([3, 1, 1, 4, 5], dim=1)]
    torch.testing.assert_close(torch.cat(parts, dim=1), symbols(row_BT), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("layers", [["toy"] * 4, LAYERS], ids=["alone", "with others"])
def test_a_meter_counts_it_by_its_own_word_and_its_parts_not_again(layers):
    model = CompactNetwork(vocab_size=20, trunk=TRUNK | {"mixers": layers})
    ids_BT = torch.randint(0, 20, (3, 12))
    foretold = sum(3 * 12 * one for one in (model.trunk.flops_per_position(12), 2 * model.head.weight.numel()))
    meter = FlopMeter([model])
    model(ids_BT).sum().backward()
    assert meter.flops == pytest.approx(3 * foretold, rel=0.01)
    if "hyena" not in layers:
        before = meter.flops
        with torch.no_grad():
            cache = TrunkCache.empty(model.trunk, 3, "cpu", torch.float32)
            for part_BT in ids_BT.split([5, 1, 6], dim=1):
                model(part_BT, cache=cache)
        assert meter.flops - before == pytest.approx(foretold, rel=0.01)
    meter.close()


def test_a_saved_model_comes_back_writes_and_says_which_mixer_is_missing(tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from limbeck.models.compact import CompactConfig, CompactForCausalLM

    model = CompactForCausalLM(CompactConfig(vocab_size=20, trunk=TRUNK)).eval()
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    prompts_BT = torch.tensor([[0, 3, 5, 7], [4, 9, 2, 6]])
    mask_BT = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
    options = {"attention_mask": mask_BT, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    with_cache = again.generate(prompts_BT, **options)
    assert with_cache.tolist() == model.generate(prompts_BT, use_cache=False, **options).tolist()
    assert model.forward_flops_per_token(64) == again.forward_flops_per_token(64)
    monkeypatch.delitem(MIXERS, "toy")
    with pytest.raises(RecipeError, match='unknown mixer "toy".*--plugin FILE.py'):
        AutoModelForCausalLM.from_pretrained(tmp_path)
