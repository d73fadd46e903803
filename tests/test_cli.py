"""The commands: what they print, where, and how they end."""

import errno
import json
import os
import signal
import subprocess
import sys
import types

import pytest
from typer.testing import CliRunner

import limbeck
from limbeck.cli import app
from limbeck.console import finite, show_facts, words
from limbeck.core.errors import DataError
from limbeck.recipe_io import load_recipe

REPORT = {
    "verdict": {"headline": "It worked.", "gained": ["speed"], "lost": ["recall"], "warnings": ["one seed"]},
    "student": {"samples": [{"prompt": "The capital's", "text": "..."}]},
    "nothing": float("nan"),
}
HEAVY = ("torch", "transformers", "pydantic", "ruamel", "numpy", "rich")


class FakePipeline:
    """Stands for the pipeline and its later commands: remembers the call, prints noise, answers or fails."""

    def __init__(self, failure=None):
        self.failure, self.calls = failure, []

    def answer(self, value):
        def call(*args, **kwargs):
            self.calls.append((args, kwargs))
            print("noise from a library")
            if self.failure is not None:
                raise self.failure
            return value

        return call

    def modules(self):
        row = {"text": "t", "tokens": 5, "perplexity": 3.0, "protocol": {"context_tokens": 8}}
        score = {"place": "run", "parameters": 1_000, "texts": [row]}
        return {
            "pipeline": types.SimpleNamespace(run=self.answer(REPORT)),
            "evaluation": types.SimpleNamespace(
                evaluate_place=self.answer(score), compare_places=self.answer([score, score]),
                render_report=self.answer(REPORT),
            ),
            "writing": types.SimpleNamespace(
                generate_from=self.answer(piece for piece in ["Once", " upon"]), prepare_process=lambda place: None
            ),
        }  # fmt: skip


@pytest.fixture
def fake(monkeypatch):
    def install(failure=None):
        pipeline = FakePipeline(failure)
        for name, module in pipeline.modules().items():
            monkeypatch.setitem(sys.modules, f"limbeck.{name}", module)
            monkeypatch.setattr(limbeck, name, module, raising=False)
        return pipeline

    return install


def run(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args])


def python(code, *args):
    return subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, timeout=120)


def test_importing_the_commands_and_asking_for_help_loads_nothing_heavy():
    code = f"import sys, limbeck.cli; print(sorted(set({HEAVY!r}) & set(sys.modules)))"
    assert python(code).stdout.strip() == "[]"
    code = (
        "import sys\nsys.argv = ['limbeck', '--help']\nimport limbeck.__main__\n"
        "try: limbeck.__main__.main()\nexcept SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'pydantic', 'numpy'} & set(sys.modules)))"
    )
    assert python(code).stdout.strip().endswith("[]")


def test_reading_a_recipe_loads_no_torch():
    code = "import sys\nfrom limbeck.recipe_io import load_recipe\nload_recipe('demo')\nprint('torch' in sys.modules)"
    assert python(code).stdout.strip() == "False"


@pytest.mark.parametrize(
    "command", ["demo", "run", "plan", "eval", "compare", "generate", "report", "doctor", "schema", "presets"]
)
def test_every_command_explains_itself(command):
    result = run(command, "--help")
    assert result.exit_code == 0
    assert "Usage" in result.stdout


def test_version():
    assert run("--version").stdout.strip() == f"limbeck {limbeck.__version__}"


def test_the_end_of_a_run_says_what_came_out_where_it_is_and_what_to_type_next(fake, tmp_path):
    pipeline = fake()
    folder = tmp_path / "my run"
    result = run("run", "demo", "seed=5", "--budget", "0.5x", "--run-folder", folder)
    assert result.exit_code == 0
    (recipe,), options = pipeline.calls[0]
    assert (recipe.seed, options) == (5, {"run_folder": folder, "progress": True})
    assert recipe.stages[0].tokens == load_recipe("demo").stages[0].tokens // 2
    last = result.stdout.splitlines()[-7:]
    assert last == [
        "It worked.", "+ speed", "- recall", "! one seed", "", f"report: {folder}/report.html",
        f"next:   limbeck generate '{folder}' 'The capital'\"'\"'s'",
    ]  # fmt: skip


def test_a_run_says_at_once_that_it_begins(fake, monkeypatch):
    fake(DataError("bad"))
    assert run("run", "demo").stderr.startswith("reading the recipe demo, then teacher and text ...\n")
    assert run("run", "demo", "--json").stderr.startswith("noise")
    monkeypatch.setenv("RANK", "1")
    assert "reading" not in run("run", "demo").stderr


def test_a_run_begins_to_speak_before_anything_heavy_is_loaded():
    code = (
        "import sys, limbeck.cli\n"
        "def tell(text): print(text, sorted({'torch', 'pydantic', 'ruamel'} & set(sys.modules))); raise SystemExit\n"
        "limbeck.cli.say_beginning = tell\n"
        "limbeck.cli._run('demo', [], budget=1.0, run_folder=None, open_report=False, as_json=False)"
    )
    assert python(code).stdout.strip().endswith("... []")


class Ranks:
    """Processes of one run, one after the other, with the store that torchrun keeps for them."""

    def __init__(self, monkeypatch):
        from torch.distributed import TCPStore

        self.monkeypatch = monkeypatch
        self.store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for name, value in {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": self.store.port, "WORLD_SIZE": 2}.items():
            monkeypatch.setenv(name, str(value))

    def run(self, rank, *args):
        self.monkeypatch.setenv("RANK", str(rank))
        return run(*args)


def test_of_many_processes_one_says_what_all_of_them_met(monkeypatch):
    ranks = Ranks(monkeypatch)
    first, second = (ranks.run(rank, "run", "demo", "sed=1") for rank in (0, 1))
    assert 'Did you mean "seed"?' in first.stderr
    assert (first.exit_code, second.exit_code, second.output) == (2, 2, "")
    assert 'rank 1: override "sed=2"' in ranks.run(1, "run", "demo", "sed=2").stderr


def test_what_one_process_met_alone_is_said_with_its_rank(monkeypatch):
    ranks = Ranks(monkeypatch)
    monkeypatch.setattr("limbeck.core.shared_fault.SECONDS", 0.2)
    alone = ranks.run(1, "run", "demo", "sed=1")
    assert alone.exit_code == 2
    assert alone.stderr.startswith('rank 1: override "sed=1"')
    monkeypatch.setenv("MASTER_PORT", "none")
    assert ranks.run(1, "run", "demo", "sed=1").stderr.startswith("rank 1: ")


def test_a_process_that_lost_another_one_says_where_the_reason_is(fake, monkeypatch):
    fake(RuntimeError("[pair.cc:553] Connection closed by peer [127.0.0.1]:403"))
    monkeypatch.setattr("limbeck.core.shared_fault.SECONDS", 0.2)
    lost = Ranks(monkeypatch).run(0, "run", "demo")
    assert (
        lost.exit_code,
        "Another process of this run ended" in lost.stderr,
        "a fault in Limbeck" in lost.stderr,
    ) == (1, True, False)
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert "a fault in Limbeck" in run("run", "demo").stderr


def test_the_stop_of_many_processes_is_said_once(fake, monkeypatch):
    fake(SystemExit(143))
    monkeypatch.setenv("RANK", "1")
    stopped = run("run", "demo")
    assert (stopped.exit_code, "stopped by" in stopped.stderr) == (143, False)


def test_the_demo_is_the_demo_preset(fake):
    pipeline = fake()
    assert run("demo", "--budget", "10x").exit_code == 0
    (recipe,), options = pipeline.calls[0]
    assert recipe.name == "demo"
    assert recipe.stages[0].tokens == 10 * load_recipe("demo").stages[0].tokens
    assert str(options["run_folder"]) == "runs/demo-10x"


JSON_COMMANDS = [
    ["demo"], ["run", "demo"], ["eval", "run"], ["compare", "a", "b"], ["generate", "run", "Hello"], ["report", "run"],
    ["presets"], ["presets", "demo"],
]  # fmt: skip


@pytest.mark.parametrize("command", JSON_COMMANDS, ids=" ".join)
def test_json_is_all_there_is_on_stdout(command, fake):
    fake()
    result = run(*command, "--json")
    assert result.exit_code == 0
    assert isinstance(json.loads(result.stdout), dict)
    assert "NaN" not in result.stdout


@pytest.mark.parametrize("command", JSON_COMMANDS[2:], ids=" ".join)
def test_the_same_commands_speak_to_people(command, fake):
    fake()
    result = run(*command)
    assert result.exit_code == 0
    assert result.stdout.strip()


def test_generate_writes_the_pieces_as_they_come(fake):
    pipeline = fake()
    result = run("generate", "run", "Hello", "--temperature", 0, "--top-p", 0.5, "--seed", 3, "--max-new-tokens", 7)
    assert result.stdout.endswith("Once upon\n")
    assert pipeline.calls == [(("run", "Hello"), {"max_new_tokens": 7, "temperature": 0, "top_p": 0.5, "seed": 3})]


def test_eval_hands_its_words_on(fake):
    pipeline = fake()
    run("eval", "place", "--text", "a.txt", "--text", "b.txt", "--context", 64, "--stride", 32, "--max-tokens", 99)
    options = {"texts": ["a.txt", "b.txt"], "context_tokens": 64, "stride_tokens": 32, "max_tokens": 99}
    assert pipeline.calls == [(("place",), options)]


FULL = OSError(errno.ENOSPC, "No space left on device", "/nowhere/x")


@pytest.mark.parametrize(
    ("failure", "code", "said"),
    [
        (DataError("the text [a] is empty"), 2, "the text [a] is empty"),
        (KeyboardInterrupt(), 130, "stopped by Ctrl-C; the same command continues"),
        (SystemExit(130), 130, "stopped by Ctrl-C; the same command continues"),
        (SystemExit(143), 143, "stopped by SIGTERM; the same command continues"),
        (OSError(errno.ENOSPC, "No space left on device", "model.bin"), 2, "the disk is full at model.bin: "),
        (FULL, 2, "the disk is full at /nowhere/x: "),
        (MemoryError(), 2, "micro_batch_sequences"),
        (ValueError("odd\nmore"), 1, "ValueError: odd"),
        (KeyError(), 1, "KeyError"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, BaseException) else "",
)
def test_faults_end_with_one_message_and_a_code(failure, code, said, fake):
    fake(failure)
    result = run("run", "demo")
    assert result.exit_code == code
    assert said in result.stderr
    assert "Traceback" not in result.output


def test_debug_shows_where(fake):
    fake(DataError("bad"))
    result = run("--debug", "run", "demo")
    assert result.exit_code == 2
    assert "Traceback" in result.stderr
    assert result.stderr.strip().endswith("bad\n(data: limbeck explain data)")


@pytest.mark.parametrize(
    "command",
    [
        ["nonsense"],
        ["run"],
        ["compare", "one"],
        ["demo", "--budget", "much"],
        ["demo", "--budget", "0x"],
        ["eval", "x", "--context", "-1"],
        ["generate", "run", "x", "--top-p", "2"],
        ["run", "no-such-recipe"],
        ["presets", "no-such-preset"],
        ["plan", "demo", "sed=1"],
    ],
    ids=" ".join,
)
def test_wrong_words_end_with_code_2(command, fake):
    fake()
    result = run(*command)
    assert result.exit_code == 2
    assert result.stderr.strip()
    assert "Traceback" not in result.output


def test_json_faults_leave_stdout_empty(fake):
    fake(DataError("bad"))
    result = run("eval", "x", "--json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "bad" in result.stderr


def test_sigterm_ends_with_143():
    code = (
        "import sys, types, time, limbeck, limbeck.__main__\n"
        "def wait(*args, **kwargs):\n    print('ready', flush=True)\n    time.sleep(60)\n"
        "sys.modules['limbeck.pipeline'] = limbeck.pipeline = types.SimpleNamespace(run=wait)\n"
        "sys.argv = ['limbeck', 'run', 'demo']\n"
        "limbeck.__main__.main()\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline().strip() == "ready"
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "stopped by SIGTERM; the same command continues" in errors
    assert "Traceback" not in errors


def test_a_closed_pipe_is_no_fault():
    reader, writer = os.pipe()
    os.close(reader)
    code = "import sys\nsys.argv = ['limbeck', 'schema']\nimport limbeck.__main__\nlimbeck.__main__.main()"
    done = subprocess.run([sys.executable, "-c", code], stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert "Traceback" not in done.stderr
    assert "fault in Limbeck" not in done.stderr


def test_presets_prints_a_recipe_to_begin_with(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(run("presets", "demo").stdout)
    assert run("presets", path, "--json").stdout == run("presets", "demo", "--json").stdout


def test_schema_is_a_json_schema():
    schema = json.loads(run("schema").stdout)
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert set(schema["required"]) == {"name", "teacher", "data", "stages"}


def test_the_doctor_says_facts(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    facts = json.loads(run("doctor", "--json").stdout)
    assert set(facts) == {"system", "versions", "device", "kernels", "extras", "embedded_teacher", "hub"}
    assert facts["versions"]["torch"]
    assert facts["device"]["chosen_by_auto"]
    assert facts["hub"]["state"] == "not asked: HF_HUB_OFFLINE is set"


def test_an_unreachable_hub_is_a_fact(monkeypatch):
    import huggingface_hub

    from limbeck import doctor

    def no_network():
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_session", no_network)
    assert doctor.facts()["hub"]["state"] == "not reachable (ConnectionError); local files work"


def test_figures_are_written_for_people():
    sizes = {1_500_000_000: "1.5 GB", 123_400_000: "123 MB", 2500: "2.5 kB", 12: "12 B", 10**13: "10,000 GB"}
    assert {value: words(value, unit="weights_bytes") for value in sizes} == sizes
    durations = {3.456: "3.46 s", 600: "10 min", 9000: "2.5 h", 400_000: "4.6 days"}
    assert {value: words(value, unit="seconds") for value in durations} == durations
    assert words(1234, unit="steps") == "1,234"
    assert words(12_345_678, unit="tokens") == "12.3 M"
    assert [words(value) for value in (None, True, [], [1, 2], "x")] == ["-", "yes", "-", "1, 2", "x"]
    assert finite({"a": [float("inf"), 1.5], "b": {2}}) == {"a": [None, 1.5], "b": [2]}


def test_a_table_never_breaks_a_word(monkeypatch, capsys):
    """Long names of places and tasks stay whole at 80 columns: rows stand one below the other where they do not fit."""
    monkeypatch.setenv("COLUMNS", "80")
    place = "runs/2026-11/hyena-70m-from-pythia/arms/from_scratch"
    show_facts(
        {"places": [{"place": place, "text": "/data/wiki.valid.raw (all)", "perplexity": 41.23}] * 2}, as_json=False
    )
    shown = capsys.readouterr().out
    assert shown.count(place) == 2
    assert "41.23" in shown
    cells = {
        "task": "lambada_openai perplexity",
        "a": "4.3e+07 ±4.4e+07",
        "b": "4.3e+07 ±4.4e+07 win",
        "c": "4.3e+07 ±4.4e+07 lose",
    }
    show_facts({"tasks": [cells]}, as_json=False)
    lines = capsys.readouterr().out.splitlines()
    assert any("lambada_openai" in line and "4.3e+07" in line for line in lines), (
        "what fits when broken at blanks is a table"
    )
    assert max(map(len, lines)) <= 80


def test_bytes_that_are_no_utf8_are_escaped_in_json(capfd):
    """A prompt of any bytes comes from the command line as lone surrogates."""
    from limbeck.console import show_facts

    show_facts({"prompt": "caf\u00e9 \udcff"}, as_json=True)
    shown = capfd.readouterr().out
    assert json.loads(shown) == {"prompt": "caf\u00e9 \udcff"}
    assert "caf\u00e9" in shown
