"""Models read without transformers: the same text as with it, in a process that never loads it."""

import functools
import json
import subprocess
import sys

import pytest
import torch
from tests.models import toy_tokenizers as toy
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from limbeck.core.errors import CheckpointError
from limbeck.core.symbols import EOP, PAD
from limbeck.models.bare import _NETWORKS, continue_bytes, load_bare, stream_bare
from limbeck.models.bare_folder import MODEL_TYPES, is_bare
from limbeck.models.byte_tokenizer import ByteTokenizer
from limbeck.models.generation import continue_text, stream_text
from limbeck.models.sizes import SIZES
from limbeck.models.token_bytes import read_token_bytes

TRUNK = {"width": 32, "layers": 2, "heads": 2, "feed_forward": 64}
LOCAL = {"local_width": 16, "local_heads": 2, "encoder_layers": 1, "decoder_layers": 1, "local_feed_forward": 32}
HYENA = {**TRUNK, "mixers": ["hyena", "attention"]}
KINDS = ["byte pool", "hyena", "parallel", "bpe borders", "compact", "untied", "flat bytes", "sentencepiece"]


@functools.cache
def tokenizers():
    return {
        "byte pool": ByteTokenizer(patch_bytes=8), "hyena": ByteTokenizer("fixed:3", patch_bytes=8),
        "parallel": ByteTokenizer(patch_bytes=8), "bpe borders": ByteTokenizer.from_tokenizer(toy.byte_level(400), patch_bytes=8),
        "compact": toy.byte_level(400), "untied": toy.byte_level(300), "flat bytes": ByteTokenizer(patch_bytes=8),
        "sentencepiece": toy.sentence_piece(),
    }  # fmt: skip


def new_model(kind):
    tokenizer = tokenizers()[kind]
    if kind in ("byte pool", "hyena", "parallel", "bpe borders"):
        mode = {"mode": "stlm_parallel"} if kind == "parallel" else {}
        trunk = HYENA if kind == "hyena" else TRUNK
        config = AutoConfig.for_model("limbeck_bytepool", trunk=trunk, patch_bytes=8, **LOCAL, **mode)
    else:
        config = AutoConfig.for_model(
            "limbeck_compact", trunk=TRUNK, vocab_size=len(tokenizer), tie_embeddings=kind != "untied",
            bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    @functools.cache
    def saved(kind):
        place = tmp_path_factory.mktemp("models") / kind.replace(" ", "-")
        new_model(kind).save_pretrained(place)
        tokenizers()[kind].save_pretrained(place)
        return place

    return saved


def prompts(kind):
    return ["Ada met Bo", "", "caf\u00e9 日本 ", "x" * 30] + (
        [] if kind in ("compact", "sentencepiece") else ["\0 \r\n"]
    )


@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_the_whole_text(kind, folder):
    model, other = load_bare(folder(kind)), AutoModelForCausalLM.from_pretrained(folder(kind)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder(kind))
    for prompt in [*prompts(kind), "a <|endoftext|> b</s>"]:
        ids = model.encode(prompt.encode())
        expected = tokenizer(prompt)["input_ids"] or [tokenizer.bos_token_id or tokenizer.eos_token_id]
        assert ids == expected
        read = model.start()
        more = [40, 41]
        found = torch.stack([read(ids), read(more[:1]), read(more[1:])])
        with torch.no_grad():
            whole = other(torch.tensor([ids + more]), use_cache=False).logits[0, len(ids) - 1 :]
        torch.testing.assert_close(found, whole, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_text_as_generate_gives(kind, folder):
    model, other = load_bare(folder(kind)), AutoModelForCausalLM.from_pretrained(folder(kind)).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder(kind))
    ways = [{}, {"temperature": 0.8}, {"temperature": 1.5, "top_p": 0.7}]
    for prompt, options in zip(["Ada met Bo", "caf\u00e9 日本 ", ""], ways):
        ids_BT = torch.tensor([model.encode(prompt.encode())])
        torch.manual_seed(3)
        drawn = {"do_sample": bool(options), "attention_mask": torch.ones_like(ids_BT), **options}
        row = other.generate(ids_BT, max_new_tokens=24, pad_token_id=0, **drawn)[0, ids_BT.shape[1] :]
        torch.manual_seed(3)
        data = b"".join(continue_bytes(model, prompt, max_new_tokens=24, **options))
        assert data == read_token_bytes(tokenizer).join(row.tolist())
        torch.manual_seed(3)
        text = "".join(stream_bare(model, prompt, max_new_tokens=24, **options))
        assert text == data.decode(errors="replace")
        if kind != "sentencepiece":  # whose decoder takes a run of bytes for U+FFFD if any of it is no text
            torch.manual_seed(3)
            assert text == "".join(stream_text(other, tokenizer, prompt, max_new_tokens=24, **options))


def test_generated_streams_keep_the_grammar(folder):
    tokenizer = tokenizers()["byte pool"]
    other = AutoModelForCausalLM.from_pretrained(folder("byte pool")).eval()
    torch.manual_seed(0)
    prompt = tokenizer(["Ada met", "B"], padding=True, return_tensors="pt")
    rows = other.generate(**prompt, do_sample=True, max_new_tokens=60, eos_token_id=None, pad_token_id=PAD)
    for row in rows[:, prompt["input_ids"].shape[1] :].tolist():
        last = 0
        for place, symbol in enumerate(row):
            assert symbol < 256 or symbol in (EOP, 258)
            last = last + 1 if symbol < 256 else 0
            assert last < 8
            assert symbol != EOP or place == 0 or row[place - 1] < 256
    assert continue_text(other, tokenizer, "Ada", max_new_tokens=5) == "".join(
        stream_bare(load_bare(folder("byte pool")), "Ada", max_new_tokens=5)
    )


def test_a_text_that_ends_and_bytes_as_a_prompt(folder):
    model = load_bare(folder("byte pool"))
    prompt = b"Ada \xff\xfe"
    whole = b"".join(continue_bytes(model, prompt, max_new_tokens=40))
    first = model.encode(prompt)
    assert first[-2:] == [0xFF, 0xFE]
    read = model.start()
    first_id = int(read(first).argmax())
    ended = type(model)(model.network, model.start, model.encode, model.pieces, frozenset([first_id]))
    assert b"".join(continue_bytes(ended, prompt, max_new_tokens=40)) == b""
    assert len(whole) <= 40
    assert list(continue_bytes(model, prompt, max_new_tokens=0)) == []


def test_loading_draws_nothing_from_the_generator(folder):
    compact = folder("compact")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    model = load_bare(compact)
    assert torch.equal(torch.rand(3), expected)
    assert not any(parameter.requires_grad for parameter in model.network.parameters())
    assert not model.network.training


def test_half_precision(folder):
    model = load_bare(folder("byte pool"), dtype=torch.bfloat16)
    assert len(b"".join(continue_bytes(model, "Ada", max_new_tokens=12))) > 0


def copied(source, target):
    target.mkdir()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def test_what_is_no_bare_folder(folder, tmp_path):
    assert set(MODEL_TYPES) == set(_NETWORKS)
    assert is_bare(folder("byte pool"))
    assert is_bare(folder("compact"))
    assert not is_bare(tmp_path)
    for name in ("model.safetensors", "config.json", "segmenter.json"):
        place = copied(folder("byte pool"), tmp_path / name)
        (place / name).unlink()
        assert not is_bare(place)
        with pytest.raises(CheckpointError, match="transformers"):
            load_bare(place)
    for number, content in enumerate(("{", "[]", json.dumps({"model_type": "llama"}))):
        place = copied(folder("byte pool"), tmp_path / str(number))
        (place / "config.json").write_text(content)
        assert not is_bare(place)


def test_damaged_folders_are_refused(folder, tmp_path):
    place = copied(folder("byte pool"), tmp_path / "a")
    (place / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(CheckpointError, match="damaged"):
        load_bare(place)
    place = copied(folder("byte pool"), tmp_path / "b")
    config = json.loads((place / "config.json").read_text())
    (place / "config.json").write_text(json.dumps(config | {"local_feed_forward": 48}))
    with pytest.raises(CheckpointError, match="does not hold what"):
        load_bare(place)
    place = copied(folder("compact"), tmp_path / "c")
    config = json.loads((place / "config.json").read_text())
    del config["trunk"]
    (place / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="config.json is damaged"):
        load_bare(place)
    place = copied(folder("untied"), tmp_path / "d")
    tokenizers()["compact"].save_pretrained(place)
    with pytest.raises(CheckpointError, match="wrong tokenizer"):
        load_bare(place)


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("config.json", {"vocab_size": 300}, "a byte model has 260 symbols"),
        ("config.json", {"vocab_size": "260"}, "a byte model has 260 symbols"),
        ("config.json", {"patch_bytes": 10**15}, "config.json is damaged"),
        ("config.json", {"local_width": 2.5}, "config.json is damaged"),
        ("config.json", {"eos_token_id": "end"}, "eos_token_id is"),
        ("generation_config.json", {"eos_token_id": ["258"]}, "generation_config.json is damaged"),
        ("segmenter.json", {"patch_bytes": 99}, "wrong tokenizer. It makes patches of up to 99"),
    ],
)
def test_numbers_that_cannot_be_are_refused(folder, tmp_path, file, changes, words):
    place = copied(folder("byte pool"), tmp_path / "a")
    if file == "config.json":
        (place / "generation_config.json").unlink(missing_ok=True)
    kept = json.loads((place / file).read_text()) if (place / file).exists() else {}
    (place / file).write_text(json.dumps(kept | changes))
    with pytest.raises(CheckpointError, match=words):
        load_bare(place)


def test_weights_that_are_not_numbers_are_refused(folder):
    model = load_bare(folder("compact"))
    with torch.no_grad():
        next(model.network.parameters()).fill_(float("nan"))
    with pytest.raises(CheckpointError, match="not numbers"):
        list(continue_bytes(model, "Ada", max_new_tokens=3))


@pytest.mark.parametrize("kind", ["byte pool", "bpe borders", "compact"])
def test_transformers_is_never_loaded(kind, folder):
    code = (
        "import sys, pathlib; from limbeck.models.bare import load_bare, stream_bare;"
        f"model = load_bare(pathlib.Path({str(folder(kind))!r}));"
        "text = ''.join(stream_bare(model, 'Ada met Bo', max_new_tokens=8, temperature=1.0));"
        "assert not {'transformers', 'sympy', 'torch._dynamo'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("kind", ["byte pool", "hyena", "bpe borders", "compact"])
def test_generate_loads_only_what_it_needs_and_writes_the_same(kind, folder):
    code = (
        "import sys\nsys.argv[:1] = ['limbeck', 'generate']\n"
        "from limbeck.__main__ import main\ntry: main()\nexcept SystemExit as end: assert not end.code\n"
        "print(sorted({'transformers', 'pydantic', 'typer', 'rich', 'sympy', 'torch._dynamo', 'torch._prims'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder(kind)), "Ada met Bo", "--max-new-tokens", "24", "--seed", "3"],
        check=True,
        capture_output=True,
        text=True,
    )
    torch.manual_seed(3)
    text = "".join(stream_bare(load_bare(folder(kind)), "Ada met Bo", max_new_tokens=24, temperature=0.8, top_p=0.95))
    assert done.stdout == f"{text}\n[]\n"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["bytepool-10m", "bpe-10m"])
def test_ten_million_parameters_need_little_beside_torch(name, tmp_path):
    words = dict(SIZES[name])
    config = AutoConfig.for_model(words.pop("model_type"), **words)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    (ByteTokenizer() if name == "bytepool-10m" else toy.byte_level(400)).save_pretrained(tmp_path)
    code = (
        "import resource, torch; before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "import pathlib; from limbeck.models.bare import load_bare, stream_bare\n"
        f"model = load_bare(pathlib.Path({str(tmp_path)!r}))\n"
        "text = ''.join(stream_bare(model, 'Ada met Bo', max_new_tokens=30, temperature=1.0))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 90  # MB, of which 39 are the weights
