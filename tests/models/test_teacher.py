import json

import numpy as np
import pytest
import torch
from huggingface_hub import errors as hub
from tests.models.families import tiny_teacher, token_ids
from transformers import AutoConfig, AutoModelForCausalLM, BertConfig, BertLMHeadModel

from limbeck.core.errors import TeacherError
from limbeck.models import teacher as teacher_module
from limbeck.models.hybrid import build_student
from limbeck.models.teacher import fingerprint, load_teacher, load_tokenizer
from limbeck.models.tokenizers import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["one two three", "four five"], vocab_size=262)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), num_key_value_heads=1, max_position_embeddings=32, **sizes
    )
    return AutoModelForCausalLM.from_config(config).eval()


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_folder_is_loaded_whole(folder, model, tokenizer):
    loaded = load_teacher(str(folder))
    assert (loaded.kind, loaded.source) == ("folder", str(folder))
    assert not loaded.model.training
    assert loaded.tokenizer("one two")["input_ids"] == tokenizer("one two")["input_ids"]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(loaded.model.state_dict()[name], tensor, atol=0, rtol=0)
    assert loaded.fingerprint == fingerprint(model)
    assert load_teacher(str(folder), dtype="bfloat16").model.dtype == torch.bfloat16
    assert load_tokenizer(str(folder)).get_vocab() == tokenizer.get_vocab()


def test_a_student_folder_is_a_teacher_too(model, tokenizer, tmp_path):
    student = build_student(model, mixers=["hyena", "attention"], hyena={})
    student.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = load_teacher(str(tmp_path))
    assert sorted(loaded.model.mixers()) == [0]
    assert loaded.fingerprint == fingerprint(student)


def test_the_fingerprint_tells_models_apart(model, folder):
    same = load_teacher(str(folder)).model
    with torch.no_grad():
        same.model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert fingerprint(same) != fingerprint(model)
    assert fingerprint(tiny_teacher("llama")) != fingerprint(tiny_teacher("mistral"))
    assert len(fingerprint(model)) == 64


def test_an_unknown_dtype_is_named(folder):
    with pytest.raises(TeacherError, match='unknown dtype "float8"'):
        load_teacher(str(folder), dtype="float8")


def test_a_missing_folder_or_file(tmp_path):
    with pytest.raises(TeacherError, match="there is no folder"):
        load_teacher(str(tmp_path / "nowhere"))
    with pytest.raises(TeacherError, match="there is no file"):
        load_teacher(str(tmp_path / "nothing.gguf"))
    (tmp_path / "weights.pt").write_bytes(b"")
    with pytest.raises(TeacherError, match="unknown kind"):
        load_teacher(str(tmp_path / "weights.pt"))


def test_a_folder_without_config_weights_or_tokenizer(folder):
    weights = folder / "model.safetensors"
    weights.rename(folder / "hidden")
    with pytest.raises(TeacherError, match="no weights"):
        load_teacher(str(folder))
    (folder / "hidden").rename(weights)
    for file in folder.glob("*token*"):
        file.unlink()
    with pytest.raises(TeacherError, match="tokenizer"):
        load_teacher(str(folder))
    (folder / "config.json").unlink()
    with pytest.raises(TeacherError, match=r"config\.json is missing"):
        load_teacher(str(folder))


def test_damaged_files(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for damaged in (whole[: len(whole) // 2], whole[:100], b""):
        weights.write_bytes(damaged)
        with pytest.raises(TeacherError, match="truncated or damaged"):
            load_teacher(str(folder))
    weights.write_bytes(whole)
    (folder / "config.json").write_text("{")
    with pytest.raises(TeacherError, match="not readable JSON"):
        load_teacher(str(folder))
    (folder / "config.json").write_text("{}")
    with pytest.raises(TeacherError, match="names no model_type"):
        load_teacher(str(folder))


def edit_config(folder, **changes: object) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_a_config_that_asks_for_more_than_is_there(folder):
    edit_config(folder, num_hidden_layers=3)
    with pytest.raises(TeacherError, match=r"weights are missing \(model\.layers\.2"):
        load_teacher(str(folder))


def test_a_config_of_other_sizes(folder):
    edit_config(folder, hidden_size=24)
    with pytest.raises(TeacherError, match="cannot be loaded"):
        load_teacher(str(folder))


def test_hostile_configs(folder):
    edit_config(folder, num_hidden_layers=10**9)
    with pytest.raises(TeacherError, match="1000000000 layers"):
        load_teacher(str(folder))
    edit_config(folder, num_hidden_layers=2, attn_implementation="someone/kernel")
    with pytest.raises(TeacherError, match="attention code from the Hub"):
        load_teacher(str(folder))


def test_a_family_nobody_knows(folder):
    edit_config(folder, model_type="no_such_family")
    with pytest.raises(TeacherError, match="no_such_family"):
        load_teacher(str(folder))


def test_code_of_the_authors_is_not_run(folder):
    edit_config(
        folder, model_type="theirs", auto_map={"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    )
    (folder / "code.py").write_text("raise SystemExit('code was run')")
    with pytest.raises(TeacherError, match="trust_remote_code"):
        load_teacher(str(folder))


def test_models_that_are_no_decoders(folder):
    edit_config(folder, model_type="t5", is_encoder_decoder=True)
    with pytest.raises(TeacherError, match="encoder-decoder"):
        load_teacher(str(folder))
    edit_config(folder, model_type="vit", is_encoder_decoder=False)
    with pytest.raises(TeacherError, match="not a causal language model"):
        load_teacher(str(folder))


def test_a_model_that_looks_ahead(tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertLMHeadModel(BertConfig(vocab_size=len(tokenizer), **sizes)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(TeacherError, match="later tokens"):
        load_teacher(str(tmp_path))


def test_a_tokenizer_of_another_model(folder):
    train_tokenizer(["one two three four five six"] * 3, vocab_size=270).save_pretrained(folder)
    with pytest.raises(TeacherError, match="wrong tokenizer"):
        load_teacher(str(folder))


def failing(error: Exception):
    def from_pretrained(*_args: object, **_kwargs: object) -> None:
        raise OSError("could not load") from error

    return from_pretrained


def response():
    import httpx2 as client

    return client.Response(404, request=client.Request("GET", "https://huggingface.co"))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (hub.GatedRepoError, "hf auth login"),
        (hub.RevisionNotFoundError, "teacher.revision"),
        (hub.RepositoryNotFoundError, "Check the spelling"),
        (hub.LocalEntryNotFoundError, "cannot be reached"),
    ],
)
def test_what_the_hub_says(monkeypatch, kind, words):
    monkeypatch.setattr(teacher_module, "ask_hub_once", lambda name, revision: None)
    error = kind("no") if kind is hub.LocalEntryNotFoundError else kind("no", response=response())
    monkeypatch.setattr(teacher_module.AutoConfig, "from_pretrained", failing(error))
    with pytest.raises(TeacherError, match=words):
        load_teacher("someone/some-model")


@pytest.mark.parametrize("load", [load_teacher, load_tokenizer])
def test_the_hub_out_of_reach(load):
    with pytest.raises(TeacherError, match="no folder here.*the Hub cannot be reached"):
        load("someone/some-model-that-is-nowhere")


@pytest.mark.parametrize("load", [load_teacher, load_tokenizer])
@pytest.mark.parametrize("name", ["nowhere", "someone/nowhere"])
def test_a_hub_that_does_not_answer_is_asked_once(monkeypatch, load, name):
    asked = []

    def silent(self, repo_id, **options):
        asked.append(repo_id)
        raise ConnectionError("no route")

    for kind in (teacher_module.AutoConfig, teacher_module.AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", failing(AssertionError("transformers asks again and again")))
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", silent)
    with pytest.raises(TeacherError, match=r"cannot be reached to ask for it \(no route\)"):
        load(name)
    assert asked == [name]


@pytest.mark.parametrize("answer", ["cached", "refused", "no name"])
def test_what_is_in_the_cache_or_was_answered_is_left_to_transformers(monkeypatch, answer):
    refused = hub.HfHubHTTPError("no", response=response())
    errors = {"refused": refused, "no name": ValueError("no"), "cached": ConnectionError("no route")}

    def answering(self, repo_id, **options):
        raise errors[answer]

    cached = "/somewhere/config.json" if answer == "cached" else None
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", answering)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *words, **options: cached)
    monkeypatch.setattr(teacher_module.AutoTokenizer, "from_pretrained", failing(KeyError("asked")))
    with pytest.raises(TeacherError, match="no usable tokenizer .OSError: could not load"):
        load_tokenizer("someone/some-model")


def test_the_embedded_teacher_or_words_about_it(monkeypatch, tmp_path):
    monkeypatch.setattr(teacher_module, "files", lambda _package: tmp_path)
    with pytest.raises(TeacherError, match="not part of this installation"):
        load_teacher("embedded")


def write_gguf(path, model, tokenizer) -> None:
    """The model as a GGUF file with weights in float32."""
    import gguf

    config, weights = model.config, model.state_dict()
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    tokens = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().get)
    writer.add_token_list(tokens)
    writer.add_token_types([3] + [1] * (len(tokens) - 1))
    merges = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["merges"]
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in weights.items():
        values = tensor.numpy()
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads is not None:
            values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_loaded_and_can_be_saved(model, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "tiny.gguf", model, tokenizer)
    loaded = load_teacher(str(tmp_path / "tiny.gguf"))
    assert loaded.kind == "gguf"
    assert loaded.tokenizer("one two six")["input_ids"] == tokenizer("one two six")["input_ids"]
    ids_BT = token_ids(2, 6)
    with torch.no_grad():
        torch.testing.assert_close(loaded.model(ids_BT).logits, model(ids_BT).logits, atol=1e-4, rtol=1e-4)
    loaded.model.save_pretrained(tmp_path / "saved")
    loaded.tokenizer.save_pretrained(tmp_path / "saved")
    assert load_teacher(str(tmp_path / "saved")).fingerprint == loaded.fingerprint
    student = build_student(loaded.model, mixers=["hyena", "attention"], hyena={})
    student.save_pretrained(tmp_path / "student")
    assert "quantization" not in (tmp_path / "student" / "config.json").read_text()


def test_a_damaged_gguf_file(model, tokenizer, tmp_path):
    pytest.importorskip("gguf")
    file = tmp_path / "tiny.gguf"
    write_gguf(file, model, tokenizer)
    whole = file.read_bytes()
    for damaged in (b"not a gguf file", whole[:200], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(TeacherError, match="GGUF file cannot be loaded"):
            load_teacher(str(file))
