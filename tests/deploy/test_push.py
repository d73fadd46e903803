"""From a run to the hub: the card, the folder, the upload, and every way it ends."""

import json
import shutil

import httpx2 as httpx
import pytest
from huggingface_hub import ModelCard
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, OfflineModeIsEnabled
from tests.deploy.runs import FakeHub, make_run, saved_student
from tests.evaluate.sample_facts import sample_facts
from typer.testing import CliRunner

from limbeck.cli import app
from limbeck.core.errors import PublishError
from limbeck.deploy import hub
from limbeck.deploy.task_scores import read_task_rows
from limbeck.publishing import push
from limbeck.publishing_words import carbon_grams, compute_grid

NAME = "ada/tiny-hyena"


def dry(run, tmp_path, **options):
    facts = push(run, NAME, dry_run=True, out=tmp_path / "out", **options)
    return facts, ModelCard.load(tmp_path / "out" / "README.md")


def test_the_card_of_a_run(tmp_path):
    facts, card = dry(make_run(tmp_path), tmp_path)
    data = card.data.to_dict()
    assert data["license"] == "apache-2.0"
    assert data["library_name"] == "limbeck"
    assert data["pipeline_tag"] == "text-generation"
    assert data["language"] == ["en"]
    assert "base_model" not in data  # the embedded teacher is not on the hub
    assert {"limbeck", "distillation", "hyena"} <= set(data["tags"])
    results = card.data.eval_results
    report = sample_facts().student.texts
    assert [(one.dataset_name, one.metric_type, one.metric_value) for one in results[:2]] == [
        (report[0].name, "perplexity", round(report[0].perplexity, 6)), (report[0].name, "bits-per-byte", round(report[0].bits_per_byte, 6)),
    ]  # fmt: skip
    assert results[0].metric_args["standard_error_nats_per_token"] == round(report[0].standard_error_nats, 6)
    for words in (
        "import limbeck", "AutoModelForCausalLM", "Control: from scratch", "Was the teacher needed", "How it was measured", "## Limits",
        "not measured", "arXiv:2302.10866", "arXiv:2402.03898", "Seeds: 0", "no legal advice", "transformers | 5.23.0",
    ):  # fmt: skip
        assert words in card.text, words
    assert facts["published"] is False
    assert {row["file"] for row in facts["files"]} >= {
        "README.md",
        "recipe.yaml",
        "report.md",
        "report.html",
        "model.safetensors",
        "config.json",
    }
    assert {row["file"] for row in facts["left_out"]} == {"modeling_limbeck.py"}
    assert facts["total_bytes"] == sum((tmp_path / "out" / row["file"]).stat().st_size for row in facts["files"])


def test_the_folder_loads_with_transformers_alone_after_importing_limbeck(tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import limbeck  # noqa: F401

    dry(make_run(tmp_path), tmp_path)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "auto_map" not in config  # no code goes up, so nothing points to any
    mine, theirs = (AutoModelForCausalLM.from_pretrained(folder) for folder in (tmp_path / "out", saved_student()))
    ids = AutoTokenizer.from_pretrained(tmp_path / "out")("the cat", return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(mine(ids).logits, theirs(ids).logits)


def test_distillation_that_did_not_help_is_said_at_the_top(tmp_path):
    facts = sample_facts(student=36.0, scratch=30.0)
    facts.worth = None
    _, card = dry(make_run(tmp_path, facts=facts), tmp_path)
    assert "Distillation did not help here" in card.text.partition("## What it is")[0]


def test_without_controls_nothing_is_claimed(tmp_path):
    facts = sample_facts()
    facts.controls = type(facts.controls)()
    facts.worth = None
    _, card = dry(make_run(tmp_path, facts=facts), tmp_path)
    assert "was not measured" in card.text.partition("## What it is")[0]


@pytest.mark.parametrize(
    "hostile",
    [
        '</details><script>alert("x")</script>',
        "[click](https://evil.example)",
        "| a | b |\n---",
        "\n# Heading\n",
        "![i](x)",
    ],
)
def test_a_hostile_report_is_only_text(tmp_path, hostile):
    from markdown_it import MarkdownIt

    facts = sample_facts()
    facts.run.name = hostile
    facts.run.machine["processor"] = hostile
    facts.student.texts[0].name = hostile
    facts.protocol[hostile] = hostile
    run = make_run(tmp_path, facts=facts)
    words = json.loads((run / "report.json").read_text())
    words["verdict"]["headline"] = hostile
    words["verdict"]["warnings"] = [hostile] * 1000
    (run / "report.json").write_text(json.dumps(words))
    _, card = dry(run, tmp_path)
    tokens = MarkdownIt("commonmark").enable("table").parse(card.text)
    inside = [child for token in tokens for child in (token.children or [])]
    assert not [child for child in inside if child.type in ("html_inline", "image")]
    assert [token.content.strip() for token in tokens if token.type == "html_block"] == [
        card.text.strip().splitlines()[0]
    ]
    assert all(
        child.attrs["href"].startswith("https://arxiv.org/abs/") for child in inside if child.type == "link_open"
    )
    assert "Heading" not in [tokens[at + 1].content for at, token in enumerate(tokens) if token.type == "heading_open"]
    assert len(card.text) < 100_000


def test_secrets_and_paths_never_leave_the_machine(tmp_path, monkeypatch):
    key = "sk-" + "k" * 40
    monkeypatch.setenv("THEIR_API_KEY", "a-quiet-word-of-mine")
    text = tmp_path / "home" / "ada" / "novel.txt"
    text.parent.mkdir(parents=True)
    text.write_text("x")
    more = f"capture:\n  folder: /home/ada/stores/mine\nruntime:\n  password: hunter22222\n  note: {key}\n"
    facts = sample_facts()
    facts.teaching = {"kind": "source", "store": "/home/ada/stores/mine", "url": "http://10.0.0.3:80/v1"}
    facts.student.texts[0].name = f"{text} (heldout)"
    dry(make_run(tmp_path, text=str(text), more=more, facts=facts), tmp_path)
    for path in (tmp_path / "out").iterdir():
        if path.suffix in (".md", ".yaml", ".html"):
            written = path.read_text()
            for secret in (key, "hunter22222", str(text), "/home/ada", "10.0.0.3"):
                assert secret not in written, f"{path.name}: {secret}"
    assert "source: novel.txt" in (tmp_path / "out" / "README.md").read_text()


def test_a_secret_in_the_model_folder_stops_everything(tmp_path, monkeypatch):
    monkeypatch.setenv("THEIR_API_KEY", "a-quiet-word-of-mine")
    run = make_run(tmp_path)
    (run / "model" / "notes.txt").write_text("first\na-quiet-word-of-mine\n")
    client = FakeHub()
    with pytest.raises(
        PublishError, match=r"notes\.txt holds the value of the environment variable THEIR_API_KEY \(line 2\)"
    ) as told:
        push(run, NAME, api=client)
    assert "quiet" not in str(told.value)
    assert not client.calls
    assert not list(tmp_path.glob("**/.out*"))


def test_only_the_models_own_files_go_up(tmp_path):
    run = make_run(tmp_path)
    model = run / "model"
    outside = tmp_path / "private.txt"
    outside.write_text("mine")
    (model / "link.txt").symlink_to(outside)
    for name in (
        "optimizer.safetensors",
        "scheduler.json",
        "pytorch_model.bin",
        "run.py",
        "odd name.txt",
        "training_args.json",
    ):
        (model / name).write_text("{}")
    (model / "LICENSE").write_text("the text")
    (model / "checkpoint-1").mkdir()
    words = json.loads((model / "config.json").read_text())
    words["_name_or_path"] = words["backbone"]["_name_or_path"] = "/home/ada/teachers/big"
    (model / "config.json").write_text(json.dumps(words))
    facts, _ = dry(run, tmp_path)
    names = {row["file"] for row in facts["files"]}
    assert "LICENSE" in names
    assert not names & {
        "link.txt",
        "optimizer.safetensors",
        "scheduler.json",
        "pytorch_model.bin",
        "run.py",
        "training_args.json",
    }
    assert len(facts["left_out"]) == 9
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["_name_or_path"] == config["backbone"]["_name_or_path"] == "big"
    assert (model / "config.json").read_text().count("/home/ada") == 2  # the run itself stays as it was


def test_a_licence_that_forbids(tmp_path):
    teacher = tmp_path / "llama-teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text("---\nlicense: llama2\n---\n")
    (teacher / "LICENSE.txt").write_text("LLAMA 2 COMMUNITY LICENSE AGREEMENT")
    run = make_run(tmp_path, teacher=str(teacher))
    said = []
    facts, card = dry(run, tmp_path, say=said.append)
    assert any("FORBIDS distillation" in line for line in said)
    assert "To be weighed before use" in card.text
    assert card.data.license == "llama2"
    assert (tmp_path / "out" / "LICENSE.txt").exists()
    assert "Llama 2 is licensed under" in (tmp_path / "out" / "NOTICE.txt").read_text()
    client = FakeHub()
    with pytest.raises(PublishError, match="--accept-licence"):
        push(run, NAME, api=client)
    assert not client.calls
    assert push(run, NAME, api=client, accept_licence=True)["published"]


def test_a_copy_that_is_missing_is_asked_for(tmp_path):
    teacher = tmp_path / "gemma-teacher"
    teacher.mkdir()
    (teacher / "README.md").write_text("---\nlicense: gemma\n---\n")
    said = []
    dry(make_run(tmp_path, teacher=str(teacher)), tmp_path, say=said.append)
    assert any("Put it as LICENSE" in line for line in said)


def test_an_unknown_licence_asks_and_a_given_one_is_taken(tmp_path):
    run = make_run(tmp_path, teacher="owner/unseen")
    facts, card = dry(run, tmp_path)
    assert facts["licence"] is None
    assert "no licence is stated yet" in card.text
    assert card.data.base_model == ["owner/unseen"]
    assert card.data.base_model_relation == "finetune"
    with pytest.raises(PublishError, match="give --licence"):
        push(run, NAME, api=FakeHub())
    client = FakeHub()
    assert push(run, NAME, api=client, licence="mit")["published"]
    assert ModelCard(client.repositories[NAME]["README.md"].decode()).data.license == "mit"


def test_a_licence_of_an_own_name_is_written_as_the_hub_wants_it(tmp_path):
    _, card = dry(make_run(tmp_path, teacher="owner/unseen"), tmp_path, licence="My Own Licence")
    assert (card.data.license, card.data.license_name, card.data.license_link) == ("other", "my-own-licence", "LICENSE")


def test_published_whole_and_again(tmp_path):
    client, run = FakeHub(), make_run(tmp_path)
    facts = push(run, NAME, api=client, private=True)
    assert facts["url"].endswith(NAME)
    assert set(client.repositories[NAME]) == {".gitattributes", *(row["file"] for row in facts["files"])}
    assert client.private
    push(run, NAME, api=client)  # the same run: an update
    assert len(client.messages) == 2
    assert facts["folder"] is None


def test_the_hubs_own_client_takes_what_the_stand_in_takes():
    import inspect

    from huggingface_hub import HfApi

    for name in ("create_repo", "repo_info", "list_repo_files", "hf_hub_download", "upload_folder"):
        mine, theirs = (
            inspect.signature(getattr(FakeHub, name)).parameters,
            inspect.signature(getattr(HfApi, name)).parameters,
        )
        named = [key for key, parameter in mine.items() if parameter.kind is parameter.KEYWORD_ONLY or key == "repo_id"]
        assert set(named) <= set(theirs), name


def test_the_card_of_a_hub_teacher_is_asked_for(tmp_path):
    client = FakeHub()
    client.repositories["owner/teacher"] = {"README.md": b"---\nlicense: cc-by-sa-4.0\nlanguage: [fr, en]\n---\n"}
    facts = push(make_run(tmp_path, teacher="owner/teacher"), NAME, api=client)
    assert facts["licence"] == "cc-by-sa-4.0"
    data = ModelCard(client.repositories[NAME]["README.md"].decode()).data
    assert (data.base_model, data.language) == (["owner/teacher"], ["fr", "en"])


def test_an_upload_that_was_cut_off_continues(tmp_path):
    client, run = FakeHub(failing={"upload_folder": httpx.ReadTimeout("slow")}), make_run(tmp_path)
    with pytest.raises(PublishError, match="same command again"):
        push(run, NAME, api=client)
    client.failing = {}
    assert push(run, NAME, api=client)["published"]


def test_another_model_in_the_repository_is_not_written_over(tmp_path):
    client = FakeHub()
    client.repositories[NAME] = {".gitattributes": b"", "README.md": b"# mine", "model.safetensors": b"old"}
    with pytest.raises(PublishError, match="--message"):
        push(make_run(tmp_path), NAME, api=client)
    assert client.repositories[NAME]["model.safetensors"] == b"old"
    push(tmp_path / "run", NAME, api=client, message="a better student")
    assert client.messages == ["a better student"]


def test_a_public_repository_is_not_taken_for_a_private_one(tmp_path):
    client, run = FakeHub(), make_run(tmp_path)
    push(run, NAME, api=client)
    with pytest.raises(PublishError, match="is public"):
        push(run, NAME, api=client, private=True)


def answer(status):
    request = httpx.Request("POST", "https://hub.example/api")
    return HfHubHTTPError(f"{status} error", response=httpx.Response(status, request=request))


@pytest.mark.parametrize(
    ("error", "says"),
    [(answer(401), "does not know the token"), (answer(403), "no right to write"), (answer(404), "no right to write"),
     (answer(400), "refused what was sent"), (answer(429), "asks to wait"), (answer(503), "same command again"),
     (httpx.ConnectError("no route"), "could not be reached"), (OfflineModeIsEnabled("offline"), "HF_HUB_OFFLINE"),
     (LocalTokenNotFoundError("none"), "no token"), (ConnectionResetError("reset"), "same command again")],
)  # fmt: skip
def test_every_refusal_says_what_to_do(error, says):
    with pytest.raises(PublishError, match=says), hub.explain_hub(NAME):
        raise error


@pytest.mark.parametrize("call", ["create_repo", "list_repo_files", "upload_folder"])
def test_a_refusal_at_any_call_is_explained(tmp_path, call):
    with pytest.raises(PublishError, match="no right to write"):
        push(make_run(tmp_path), NAME, api=FakeHub(failing={call: answer(403)}))


def test_a_fault_of_our_own_is_not_called_the_hubs():
    with pytest.raises(ZeroDivisionError), hub.explain_hub(NAME):
        raise ZeroDivisionError


@pytest.mark.parametrize(
    "name",
    ["tiny", "a/b/c", "ada/", "/x", "ada/.git", "ada/a--b", "ada/a b", "../x/y", "ada/x.git", "ada/" + "n" * 200],
)
def test_names_that_the_hub_would_refuse(tmp_path, name):
    with pytest.raises(PublishError, match="OWNER/NAME"):
        push(tmp_path, name, dry_run=True)


def test_offline_and_without_a_token(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: True)
    with pytest.raises(PublishError, match="HF_HUB_OFFLINE is set"):
        hub.open_hub()
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(PublishError, match="hf auth login"):
        hub.open_hub()


def test_what_is_no_run_and_no_model(tmp_path):
    with pytest.raises(PublishError, match="no folder"):
        push(tmp_path / "nowhere", NAME, dry_run=True)
    (tmp_path / "empty").mkdir()
    with pytest.raises(PublishError, match="no model that can be published"):
        push(tmp_path / "empty", NAME, dry_run=True, licence="mit", out=tmp_path / "out")
    run = make_run(tmp_path)
    (run / "report.json").unlink()
    with pytest.raises(PublishError, match="not finished"):
        push(run, NAME, dry_run=True)


def test_a_folder_of_somebody_elses_is_not_replaced(tmp_path):
    run = make_run(tmp_path)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("x")
    with pytest.raises(PublishError, match="--out"):
        dry(run, tmp_path)
    assert (tmp_path / "out" / "thesis.tex").exists()
    shutil.rmtree(tmp_path / "out")
    dry(run, tmp_path)
    dry(run, tmp_path)  # its own is


def test_a_model_folder_without_a_run(tmp_path):
    model = shutil.copytree(saved_student(), tmp_path / "saved")
    facts = push(model, NAME, dry_run=True, out=tmp_path / "out", licence="mit")
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.license == "mit"
    assert "no report came with this model" in card.text
    assert not {"recipe.yaml", "report.md"} & {row["file"] for row in facts["files"]}
    (model / "README.md").write_text("---\nlicense: gemma\nlanguage: de\n---\n# mine\n")
    facts = push(model, NAME, dry_run=True, out=tmp_path / "out")
    assert facts["licence"] == "gemma"
    assert "README.md" in {row["file"] for row in facts["left_out"]}  # the folder's own card is not published


def test_the_model_folder_of_a_run_means_the_run(tmp_path):
    run = make_run(tmp_path)
    _, card = dry(run / "model", tmp_path)
    assert "Was the teacher needed" in card.text


def test_tasks_are_read_with_patience(tmp_path):
    run = make_run(tmp_path)
    folder = run / "evaluation" / "tasks"
    folder.mkdir(parents=True)
    (folder / "arc.json").write_text(
        json.dumps(
            {
                "task": "arc_easy",
                "items": 40,
                "headline": "acc",
                "metrics": {"acc": {"value": 0.5, "standard_error": 0.08, "chance": 0.25}},
            }
        )
    )
    (folder / "flat.json").write_text(
        json.dumps({"tasks": {"piqa": {"value": 0.61, "standard_error": 0.02, "n": 100}}})
    )
    (folder / "nan.json").write_text('{"task": "x", "value": NaN}')
    (folder / "list.json").write_text("[1, 2, 3]")
    (folder / "torn.json").write_text('{"task": ')
    (folder / "deep.json").write_text("[" * 100_000)
    (folder / "evil.json").write_text(
        json.dumps({"task": "<img src=x>|", "value": 1, "standard_error": "many", "n": -3})
    )
    rows = {row.task: row for row in read_task_rows(folder)}
    assert (
        rows["arc_easy"].value,
        rows["arc_easy"].standard_error,
        rows["arc_easy"].items,
        rows["arc_easy"].chance,
    ) == (0.5, 0.08, 40, 0.25)
    assert (rows["piqa"].value, rows["piqa"].items) == (0.61, 100)
    assert set(rows) == {"arc_easy", "piqa", "<img src=x>|"}
    _, card = dry(run, tmp_path)
    assert "| arc\\_easy | acc | 0.5000 | ± 0.080 | 40 | 0.2500 |" in card.text
    assert "<img" not in card.text.replace("\\<img", "")
    assert {"arc_easy", "piqa"} <= {one.dataset_name for one in card.data.eval_results}


def suite_result(tasks, *, limit=None, group=None, **more):
    """As `limbeck eval --suite` writes it of one model."""
    figures = {
        name: {
            "group": group or name,
            "items": 40,
            "headline": "acc",
            "metrics": {"acc": {"value": value, "chance": 0.25}},
        }
        for name, value in tasks.items()
    }
    return json.dumps({"lm_eval": "0.4.13", "limit": limit, "fingerprint": "f", "tasks": figures, "groups": {}, **more})


def test_only_the_students_task_scores_are_on_its_card(tmp_path):
    run = make_run(tmp_path)
    folder = run / "evaluation" / "tasks"
    folder.mkdir(parents=True)
    (folder / "align.json").write_text(
        suite_result({"sciq": 0.1}, place="runs/z/arms/student/align")
    )  # of an older version
    (folder / "from_scratch.json").write_text(suite_result({"sciq": 0.2, "piqa": 0.2}, place="x", arm="from_scratch"))
    teacher = json.loads(suite_result({"sciq": 0.9, "boolq": 0.9}, place="embedded", arm=None))
    (folder / "embedded.json").write_text(json.dumps(teacher))
    (folder / "comparison.json").write_text(
        json.dumps({"places": {"embedded": teacher}, "comparison": {"first": "embedded"}})
    )
    (folder / "run.json").write_text(suite_result({"sciq": 0.3}, place="runs/z", arm="student"))
    (folder / "a-try.json").write_text(
        suite_result({"sciq": 0.4, "arc_easy": 0.4}, limit=40, place="a-try", arm="student")
    )
    rows = {row.task: row for row in read_task_rows(folder)}
    assert {task: (row.value, row.is_whole) for task, row in rows.items()} == {
        "sciq": (0.3, True),
        "arc_easy": (0.4, False),
    }
    _, card = dry(run, tmp_path)
    assert "a try and no result: arc\\_easy" in card.text
    assert "name: sciq" in card.content
    assert "name: arc_easy" not in card.content, "a try is not for the machine-read index"


def test_a_large_group_is_one_row_of_the_card(tmp_path):
    blimp = {
        "tasks": 9,
        "tasks_of_the_group": 67,
        "items": 360,
        "headline": "acc",
        "metrics": {"acc": {"value": 0.7, "chance": 0.5}},
    }
    names = [f"blimp_{number}" for number in range(9)]
    words = suite_result(dict.fromkeys(names, 0.7), group="blimp", place="runs/z")
    (tmp_path / "z.json").write_text(json.dumps(json.loads(words) | {"groups": {"blimp": blimp}}))
    assert [(row.task, row.items) for row in read_task_rows(tmp_path)] == [("blimp (mean of 9 of 67)", 360)]


def test_energy_and_carbon_only_where_they_were_measured(tmp_path):
    rows = dict(compute_grid({"run": {}, "student": {}}, grid_intensity=400.0).rows)
    assert rows["Energy"] == "not measured"
    assert rows["Carbon"] == "not stated: energy was not measured"
    report = {"run": {"energy_joules": 7.2e6}, "student": {}}
    assert dict(compute_grid(report, grid_intensity=None).rows)["Energy"] == "2.000 kWh"
    assert "grid was not given" in dict(compute_grid(report, grid_intensity=None).rows)["Carbon"]
    assert dict(compute_grid(report, grid_intensity=400.0).rows)["Carbon"].startswith("800.0 g CO2")
    assert carbon_grams(report, grid_intensity=400.0) == 800.0
    assert carbon_grams(report, grid_intensity=None) is None
    assert carbon_grams({"run": {}}, grid_intensity=400.0) is None
    whole = {"run": {"energy_joules": 7.2e6, "energy_note": "RAPL: package-0"}, "student": {"energy_joules": 3.6e6}}
    rows = dict(compute_grid(whole, grid_intensity=None).rows)
    assert rows["Energy"] == "2.000 kWh (RAPL: package-0)"
    assert rows["Energy, training of this model"] == "1.000 kWh"
    unread = {"run": {"energy_joules": None, "energy_note": "not reported by this machine"}, "student": {}}
    rows = dict(compute_grid(unread, grid_intensity=400.0).rows)
    assert rows["Energy"] == "not measured: not reported by this machine"
    assert rows["Carbon"] == "not stated: energy was not measured"
    said = []
    _, card = dry(make_run(tmp_path), tmp_path, grid_intensity=400.0, say=said.append)
    assert "co2_eq_emissions" not in card.data.to_dict()
    assert any("energy of this run was not measured" in line for line in said)


def test_the_command(tmp_path, monkeypatch):
    run = make_run(tmp_path)
    done = CliRunner().invoke(app, ["push", str(run), NAME, "--dry-run", "--out", str(tmp_path / "out"), "--json"])
    assert done.exit_code == 0, done.output
    assert json.loads(done.stdout)["licence"] == "apache-2.0"
    done = CliRunner().invoke(app, ["push", str(run), NAME, "--dry-run"])
    assert done.exit_code == 0
    assert "written, not published" in done.stdout
    assert (run / "push-tiny-hyena" / "README.md").exists()
    done = CliRunner().invoke(app, ["push", str(run), "tiny", "--dry-run"])
    assert done.exit_code == 2
    assert "OWNER/NAME" in done.stderr


@pytest.mark.slow
def test_the_whole_page_is_written_too(tmp_path, monkeypatch):
    import importlib

    import limbeck.evaluate.report as report

    monkeypatch.undo()
    importlib.reload(report)
    dry(make_run(tmp_path), tmp_path)
    assert "<svg" in (tmp_path / "out" / "report.html").read_text()
