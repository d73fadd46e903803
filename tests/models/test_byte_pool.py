"""The byte model in transformers: Auto classes, generation in all modes, saving, what is refused."""

import copy

import pytest
import torch
from tests.nn.small_byte_models import TRUNKS, split_patches, stream
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache

from limbeck.core.errors import RecipeError, VocabularyError
from limbeck.core.symbols import BOS, EOD, EOP, PAD, SYMBOLS
from limbeck.core.types import Batch
from limbeck.models.byte_pool import BytePoolConfig, BytePoolForCausalLM
from limbeck.models.flops import forward_flops_per_token
from limbeck.models.heads import SplitModel
from limbeck.models.packing import forward_batch
from limbeck.models.shipped import model_costs
from limbeck.models.sizes import SIZES
from limbeck.nn.byte_pool_settings import PARALLEL_DEFAULTS

P = 4


def small_model(trunk="attention", *, seed=0, **options):
    """A model with loud random weights, in evaluation mode."""
    torch.manual_seed(seed)
    values = {"patch_bytes": P, "local_width": 8, "local_heads": 2, "decoder_layers": 2, **options}
    values["trunk"] = {"width": 16, "layers": 2, "feed_forward": 24, "zero_init": False, **TRUNKS[trunk]}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("limbeck_bytepool", **values))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return model.eval()


def left_padded(*rows):
    longest = max(map(len, rows))
    return torch.tensor([[PAD] * (longest - len(row)) + list(row) for row in rows])


def is_grammatical(symbols, *, patch_bytes=P):
    """Whether symbols are a stream: BOS?, patches, and once EOD has come nothing but PAD."""
    symbols = list(symbols)
    if EOD in symbols:
        end = symbols.index(EOD) + 1
        if set(symbols[end:]) - {PAD}:
            return False
        symbols = symbols[:end]
    for number, patch in enumerate(split_patches(symbols)):
        *inside, last = patch
        if patch == [EOD] or (patch == [BOS] and number == 0):
            continue
        if any(symbol >= PAD for symbol in inside) or last in (PAD, BOS, EOD):
            return False
        if len(inside) + (last != EOP) > patch_bytes - 1 or (last == EOP and not inside):
            return False
    return True


def test_what_the_checker_takes_for_a_stream():
    assert is_grammatical([BOS, 1, 2, 3, EOP, 4, EOP, EOD, PAD, PAD])
    assert is_grammatical([1, 2, 3])
    for wrong in ([EOP], [1, 2, 3, 4], [1, EOD], [1, EOP, PAD], [EOD, 1], [1, EOP, BOS], [1, 2, 3, 4, EOP]):
        assert not is_grammatical(wrong), wrong


@pytest.mark.parametrize("name", [name for name in SIZES if SIZES[name]["model_type"] == "limbeck_bytepool"])
def test_sizes_are_those_of_the_reference(name):
    """Parameters in all, of the local parts with the embedding, and of the trunk, in millions."""
    expected = {
        "bytepool-10m": (9.75, 1.14, None), "bytepool-50m": (49.1, 3.05, None), "bytepool-100m": (99.8, 5.39, None),
        "stlm-parallel": (55.9, 5.77, 50.15), "stlm-parallel-shared": (18.0, 5.12, None),
    }[name]  # fmt: skip
    values = dict(SIZES[name])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(values.pop("model_type"), **values))
    trunk = sum(parameter.numel() for parameter in model.network.trunk.parameters())
    whole = sum(parameter.numel() for parameter in model.parameters())
    for found, printed in zip((whole, whole - trunk, trunk), expected, strict=True):
        if printed is not None:
            digits = len(f"{printed}".split(".")[1])
            assert round(found / 1e6, digits) == printed
    assert model_costs(model, context_tokens=1024)["forward_flops_per_token"] > 0


def test_local_parts_of_the_original():
    """Encoder with its embedding 3.18M, decoder with its output matrix 2.59M; twelve places a patch."""
    config = BytePoolConfig(**{name: value for name, value in SIZES["stlm-parallel"].items() if name != "model_type"})
    with torch.device("meta"):
        network = BytePoolForCausalLM(config).network

    def millions(*modules):
        return round(sum(p.numel() for module in modules for p in module.parameters()) / 1e6, 2)

    assert millions(network.encoder, network.embedding) == 3.18
    assert millions(network.decoder) + round(SYMBOLS * 128 / 1e6, 2) == 2.59
    assert config.patch_bytes == 12
    widths = [block.feed_forward.down.out_features for block in network.encoder.blocks]
    assert widths == [256, 256, 256, 768]
    assert [block.feed_forward.up.out_features for block in network.encoder.blocks] == [512, 1024, 1024, 1024]
    assert {name: getattr(config, name) for name in PARALLEL_DEFAULTS} == PARALLEL_DEFAULTS


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("mode", ["bytepool", "stlm_parallel"])
def test_save_and_load(tmp_path, trunk, mode):
    model = small_model(trunk, mode=mode, ngram_rows=8, **({"encoder_layers": 2} if mode == "stlm_parallel" else {}))
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is BytePoolForCausalLM
    ids = torch.tensor([stream(20, patch_bytes=P)])
    torch.testing.assert_close(loaded.state_dict(), model.state_dict(), rtol=0, atol=0)
    torch.testing.assert_close(loaded(ids).logits, model(ids).logits, rtol=0, atol=2e-5)
    assert all(name.startswith("network.") for name in loaded.state_dict())
    assert loaded.config.settings == model.config.settings == model.network.settings
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.generate(ids, max_new_tokens=9, do_sample=False).dtype == torch.long


def test_none_for_a_setting_is_kept(tmp_path):
    model = small_model(logit_softcap=None)
    model.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).logit_softcap is None
    assert BytePoolConfig(trunk=model.config.trunk).logit_softcap == 15.0


def test_loss_and_packed_documents():
    model = small_model()
    first, second = stream(12, patch_bytes=P, seed=1), [BOS, *stream(9, patch_bytes=P, seed=2)]
    ids = torch.tensor([first + second])
    sizes = torch.tensor([len(first), len(second)])
    documents = torch.repeat_interleave(torch.arange(2), sizes).unsqueeze(0)
    alone = torch.cat([model(torch.tensor([row]), use_cache=False).logits for row in (first, second)], dim=1)
    positions = torch.cat([torch.arange(size) for size in sizes]).unsqueeze(0)
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool), documents, positions)
    for found in (
        model(ids, document_ids=documents, use_cache=False).logits, model(ids, position_ids=positions).logits,
        forward_batch(model, batch).logits,
    ):  # fmt: skip
        torch.testing.assert_close(found, alone, atol=1e-5, rtol=0)
    out = model(ids, labels=ids)
    expected = torch.nn.functional.cross_entropy(out.logits[0, :-1].double(), ids[0, 1:])
    torch.testing.assert_close(out.loss.double(), expected, atol=1e-4, rtol=1e-6)
    out.loss.backward()


@pytest.mark.parametrize("trunk", TRUNKS)
def test_cached_pieces_give_one_pass(trunk):
    model = small_model(trunk)
    ids = torch.tensor([stream(30, patch_bytes=P, seed=1)[:30], stream(30, patch_bytes=P, seed=2)[:30]])
    with torch.no_grad():
        whole = model(ids, use_cache=False).logits
        cache = DynamicCache(config=model.config)
        found = [model(piece, past_key_values=cache).logits for piece in ids.split([7, 1, 1, 12, 9], dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), whole, atol=2e-5, rtol=0)
    assert cache.get_seq_length() == 30
    cache.reset()
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("use_cache", [False, True])
def test_what_the_mask_hides_may_be_any_symbol(use_cache):
    """Scoring pads with zeros."""
    model, row = small_model(), stream(12, patch_bytes=P, seed=1)
    expected = model(torch.tensor([row]), use_cache=False).logits[0]
    ids, mask = torch.zeros(2, len(row) + 4, dtype=torch.long), torch.zeros(2, len(row) + 4)
    ids[0, : len(row)] = ids[1, 4:] = torch.tensor(row)
    mask[0, : len(row)] = mask[1, 4:] = 1
    found = model(ids, attention_mask=mask, use_cache=use_cache).logits
    torch.testing.assert_close(found[0, : len(row)], expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1, 4:], expected, atol=1e-5, rtol=0)


PROMPTS = (
    [BOS], [BOS, 1], [BOS, 1, EOP, 2, 3, 4], [BOS, 9, 8, EOP], stream(20, patch_bytes=P, seed=3, end_share=0.0)[:19],
)  # fmt: skip
WAYS = {
    "greedy": {"do_sample": False},
    "sampling": {"do_sample": True, "temperature": 3.0, "top_k": 0},
    "cold": {"do_sample": True, "temperature": 0.05, "top_p": 0.9},
    "beams": {"num_beams": 4, "num_return_sequences": 2, "do_sample": False},
    "sampled beams": {"num_beams": 3, "do_sample": True, "temperature": 2.0},
    "penalised": {"do_sample": True, "repetition_penalty": 3.0, "no_repeat_ngram_size": 3},
    "longer": {"do_sample": True, "min_new_tokens": 15},
}


@pytest.mark.parametrize("trunk", ["attention", "hyena"])
@pytest.mark.parametrize("way", WAYS)
def test_generation_never_yields_an_invalid_stream(way, trunk):
    ids = left_padded(*PROMPTS)
    for seed in range(2):
        model = small_model(trunk, seed=seed)
        torch.manual_seed(seed)
        out = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=18, **WAYS[way])
        copies = len(out) // len(ids)
        for number, row in enumerate(out.tolist()):
            prompt = PROMPTS[number // copies]
            own = row[ids.shape[1] - len(prompt) :]
            assert own[: len(prompt)] == prompt
            assert is_grammatical(own), (own, seed)


@pytest.mark.parametrize("sampled", [False, True])
def test_more_beams_than_ways_to_go_on(sampled):
    """Only one symbol may follow; the library fills up with copies, or rows with nothing new in them."""
    for seed in range(5):
        out = small_model(seed=seed).generate(
            torch.tensor([[BOS, 1, 2, 3]]), max_new_tokens=1, num_beams=4, num_return_sequences=4, do_sample=sampled
        )
        assert out[0].tolist() == [BOS, 1, 2, 3, EOP]
        assert set(out[:, -1].tolist()) <= {EOP, PAD}


@pytest.mark.parametrize("trunk", TRUNKS)
@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_generation_with_and_without_cache_is_the_same(way, trunk):
    model, ids = small_model(trunk, seed=5), left_padded(*PROMPTS)
    mask = (ids != PAD).long()
    cached, plain = (
        model.generate(ids, attention_mask=mask, max_new_tokens=20, use_cache=use_cache, **WAYS[way])
        for use_cache in (True, False)
    )
    assert cached.tolist() == plain.tolist()


@pytest.mark.parametrize("trunk", TRUNKS)
def test_left_padded_rows_are_as_if_alone(trunk):
    model, ids = small_model(trunk, seed=6), left_padded(*PROMPTS)
    together = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=16, do_sample=False)
    for row, prompt in zip(together.tolist(), PROMPTS, strict=True):
        alone = model.generate(torch.tensor([prompt]), max_new_tokens=16, do_sample=False)[0].tolist()
        assert row[ids.shape[1] :] == (alone + [PAD] * 40)[len(prompt) :][:16]


def test_a_finished_row_stays_finished():
    model = small_model(seed=1)
    with torch.no_grad():
        model.network.embedding.symbols.weight[EOD] *= 30
    ids = left_padded([BOS, 1, EOP], [BOS, 2, 3])
    torch.manual_seed(0)
    out = model.generate(ids, attention_mask=(ids != PAD).long(), max_new_tokens=60, do_sample=True)
    assert all(EOD in row and is_grammatical([s for s in row if s != PAD]) for row in out.tolist())


def test_going_on_with_a_cache_and_in_chunks():
    model, ids = small_model(seed=2), torch.tensor([stream(23, patch_bytes=P, seed=4)[:22]])
    expected = model.generate(ids, max_new_tokens=10, do_sample=False)
    cache = DynamicCache(config=model.config)
    model(ids[:, :17], past_key_values=cache)
    again = model.generate(ids, past_key_values=cache, max_new_tokens=10, do_sample=False)
    chunked = model.generate(ids, max_new_tokens=10, do_sample=False, prefill_chunk_size=5)
    assert again.tolist() == chunked.tolist() == expected.tolist()


def test_cache_rows_can_be_repeated_and_copied():
    model, ids = small_model(), torch.tensor([[BOS, 1, 2, EOP, 3]])
    with torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        cache.batch_repeat_interleave(3)
        branch = copy.deepcopy(cache)
        more = torch.tensor([[4, EOP], [EOP, 9], [5, 6]])
        expected = model(torch.cat((ids.expand(3, -1), more), dim=1), use_cache=False).logits[:, -2:]
        torch.testing.assert_close(model(more, past_key_values=cache).logits, expected, atol=1e-5, rtol=0)
        torch.testing.assert_close(model(more, past_key_values=branch).logits, expected, atol=1e-5, rtol=0)


def test_logits_to_keep():
    model, ids = small_model(), torch.tensor([stream(15, patch_bytes=P)])
    whole = model(ids).logits
    torch.testing.assert_close(model(ids, logits_to_keep=2).logits, whole[:, -2:], atol=1e-6, rtol=0)
    chosen = torch.tensor([0, 4])
    torch.testing.assert_close(model(ids, logits_to_keep=chosen).logits, whole[:, chosen], atol=1e-6, rtol=0)
    cached = model(ids, use_cache=True, logits_to_keep=1).logits
    torch.testing.assert_close(cached, whole[:, -1:], atol=1e-5, rtol=0)


def test_losses_that_split_the_head_get_whole_logits():
    """What the grammar forbids is no function of the hidden state alone."""
    model = small_model()
    split = SplitModel(model, vocabulary_size=SYMBOLS)
    ids = torch.tensor([stream(12, patch_bytes=P)])
    hidden = split.hidden(Batch(ids, torch.ones_like(ids, dtype=torch.bool)))
    assert not split.is_split
    torch.testing.assert_close(split.head(hidden[0]), model(ids).logits[0], atol=1e-6, rtol=0)


def test_tied_matrix_counts_once_and_operations_come_from_the_network():
    model = small_model()
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    assert forward_flops_per_token(model, 100) == model.network.flops_per_symbol(100, mean_patch_bytes=4.5)
    longer = BytePoolForCausalLM(BytePoolConfig(**{**SIZES["bytepool-10m"], "mean_patch_bytes": 9}))
    shorter = BytePoolForCausalLM(BytePoolConfig(**SIZES["bytepool-10m"]))
    assert forward_flops_per_token(longer, 512) < forward_flops_per_token(shorter, 512)


def test_what_is_refused():
    model, ids = small_model(), torch.tensor([[BOS, 1, 2]])
    with pytest.raises(ValueError, match="needs input_ids"):
        model(ids, inputs_embeds=torch.zeros(1, 3, 8))
    with pytest.raises(ValueError, match="exclude each other"):
        model(ids, document_ids=torch.zeros_like(ids), use_cache=True)
    with pytest.raises(ValueError, match="must have shape"):
        model(ids, attention_mask=torch.ones(1, 1, 3, 3))
    cache = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds 1 rows, but 2"):
        model(ids.expand(2, -1), past_key_values=cache)
    with pytest.raises(ValueError, match="not made for this model"):
        model(ids, past_key_values=DynamicCache(config=AutoConfig.for_model("llama", num_hidden_layers=2)))
    with pytest.raises(ValueError, match="static cache"):
        model.generate(ids, max_new_tokens=2, cache_implementation="static")
    with pytest.raises(ValueError, match="take symbols back"):
        model(ids, use_cache=True).past_key_values.crop(-1)
    with pytest.raises(ValueError):
        model.generate(ids, max_new_tokens=2, assistant_model=small_model())
    with pytest.raises(VocabularyError, match="260 symbols"):
        model.resize_token_embeddings(300)
    assert model.resize_token_embeddings(SYMBOLS) is model.get_input_embeddings()
    with pytest.raises(VocabularyError, match="vocab_size is 50257"):
        BytePoolConfig(vocab_size=50257)
    with pytest.raises(RecipeError, match="unknown pool"):
        BytePoolConfig(trunk=model.config.trunk, pool="median")
