"""`limbeck generate` read without the command line's libraries: it means what the whole command line means by the same words."""

import inspect
import json
from typing import get_type_hints

import pytest

from limbeck import cli_generate, writing
from limbeck.__main__ import main
from limbeck.cli import generate
from limbeck.cli_generate import OPTIONS, read_words
from limbeck.core.errors import CheckpointError

DEFAULT = {"max_new_tokens": 64, "temperature": 0.8, "top_p": 0.95, "seed": 0}


@pytest.fixture
def small(tmp_path):
    for name, content in {
        "config.json": json.dumps({"model_type": "limbeck_bytepool"}),
        "model.safetensors": "",
        "segmenter.json": "",
    }.items():
        (tmp_path / name).write_text(content)
    return str(tmp_path)


def test_the_options_are_those_of_the_whole_command_line():
    options = inspect.signature(generate).parameters
    annotations = get_type_hints(generate, include_extras=True)
    assert {f"--{name.replace('_', '-')}" for name in options} == set(OPTIONS) | {"--place", "--prompt", "--as-json"}
    for name, option in OPTIONS.items():
        key = name[2:].replace("-", "_")
        told = annotations[key].__metadata__[0]
        assert (options[key].default, told.min) == (option.default, option.least)
        assert told.max in (option.most, None)
        assert type(option.default) is get_type_hints(generate)[key]


def test_plain_words(small):
    assert read_words(["generate", small, "Once upon"]) == (small, "Once upon", DEFAULT)
    words = [
        "generate",
        "--seed",
        "3",
        small,
        "--temperature=0",
        "",
        "--top-p",
        ".5".rjust(3, "0"),
        "--max-new-tokens",
        "7",
    ]
    assert read_words(words) == (small, "", {"max_new_tokens": 7, "temperature": 0.0, "top_p": 0.5, "seed": 3})
    assert read_words(["generate", small, "x", "--seed", "1", "--seed", "2"]) == (small, "x", DEFAULT | {"seed": 2})


@pytest.mark.parametrize(
    "words",
    [
        [], ["plan", "x"], ["generate"], ["generate", "PLACE"], ["generate", "PLACE", "a", "b"], ["generate", "nowhere", "a"],
        ["generate", "PLACE", "a", "--help"], ["generate", "PLACE", "a", "--json"], ["generate", "PLACE", "a", "--seed"],
        ["generate", "PLACE", "a", "--seed", "-1"], ["generate", "PLACE", "a", "--seed", "1.5"], ["generate", "PLACE", "a", "--top-p", "2"],
        ["generate", "PLACE", "a", "--temperature", "nan"], ["generate", "PLACE", "--", "-a"], ["generate", "PLACE", "a", "--max-new-tokens", "0"],
        ["--debug", "generate", "PLACE", "a"], ["generate", "PLACE", "a", "--seed", "٣"],
    ],
    ids=" ".join,
)  # fmt: skip
def test_everything_else_is_left_to_the_whole_command_line(words, small):
    assert read_words([small if word == "PLACE" else word for word in words]) is None


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (CheckpointError("the weights are damaged"), 2, "the weights are damaged\n(checkpoint: limbeck explain checkpoint)"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C"),
        (SystemExit(143), 143, "stopped by SIGTERM"),
        (ValueError("odd"), 1, "ValueError: odd"),
        (None, 0, ""),
    ],
)  # fmt: skip
def test_how_it_ends(failure, code, said, small, monkeypatch, capsys):
    def pieces(*words, **choice):
        yield "Once"
        if failure is not None:
            raise failure

    monkeypatch.setattr(cli_generate.writing, "generate_from", pieces)
    monkeypatch.setattr(writing, "prepare_process", lambda place: None)
    monkeypatch.setattr("sys.argv", ["limbeck", "generate", small, "x"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == code
    out = capsys.readouterr()
    assert out.out.startswith("Once")
    assert said in out.err


def test_a_prompt_in_the_place_of_the_model_is_refused_however_long_it_is(small, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["limbeck", "generate", "Once upon a time " * 40, small])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert "too long" in capsys.readouterr().err
