"""Texts before a run: what cannot be read is said by the plan, and how often the budget reads the rest."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from limbeck import planning_texts
from limbeck.core.errors import DataError
from limbeck.data.text import TextSource, read_documents
from limbeck.planning import Machine, PlanError, plan
from limbeck.planning_texts import look_at_texts
from limbeck.recipe_io import parse_recipe

ROOMY = Machine(device="cpu", memory_bytes=10**12, free_disk_bytes=10**12, matmul_flops_per_second=1e9)
RECIPE = """\
name: trial
teacher: null
tokenizer: {segmenter: space}
student: {size: bytepool-10m, initialisation: random}
data: {train: [TEXT], heldout: [HELD], context_tokens: 64}
stages: [{kind: tune, tokens: 64_000, batch_tokens: 640, learning_rate: 1e-3}]
controls: {from_scratch: false, copied: false, teacher_more: false, floor: false}
"""


def recipe(train, *overrides, heldout="{source: factbook, split: heldout}"):
    return parse_recipe(RECIPE.replace("TEXT", str(train)).replace("HELD", str(heldout)), overrides)


def rows(count, column="text"):
    return [{column: f"Row {number:05} é. " * 12, "other": number} for number in range(count)]


def write_jsonl(path, count, column="text"):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows(count, column)))
    return path


def test_a_small_text_is_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", 100)
    found = look_at_texts(recipe(path, heldout=path))
    texts = list(read_documents(TextSource(str(path))))
    size = sum(len(text.encode()) for text in texts)
    assert found.rows[0] == {
        "text": f"{path} (train)", "for": "training", "bytes": size, "documents": 98, "tokens": round(1.25 * size),
        "times_read": round(64_000 / round(1.25 * size), 2),
    }  # fmt: skip
    assert (found.rows[1]["for"], found.rows[1]["documents"]) == ("held out", 2)
    assert (found.problems, found.warnings) == ([], [])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "txt", "folder", "lines"])
def test_a_large_text_is_estimated_from_its_beginning(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(planning_texts, "SAMPLE_BYTES", 4_000)
    path, count = tmp_path / f"a.{kind}", 3_000
    if kind == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows(count)), path)
    elif kind == "txt":
        path.write_text("".join(f"{'a line of text. ' * 5}\n\n" for _ in range(count)))
    elif kind == "folder":
        path.mkdir()
        write_jsonl(path / "a.jsonl", count // 2)
        write_jsonl(path / "b.jsonl", count // 2)
    else:
        path = write_jsonl(tmp_path / "a.jsonl", count)
    words = f"{{source: {path}, rows: lines}}" if kind == "lines" else path
    whole = list(read_documents(TextSource(str(path), rows="lines" if kind == "lines" else "documents")))
    row = look_at_texts(recipe(words)).rows[0]
    assert row["bytes"] == pytest.approx(sum(len(text.encode()) for text in whole), rel=0.05)
    assert row["documents"] == pytest.approx(len(whole), rel=0.08)


def test_the_tokens_of_a_tokenizer_are_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", 100)
    text = (
        RECIPE.replace("null", "{source: embedded}")
        .replace("{segmenter: space}", "{}")
        .replace("{size: bytepool-10m, initialisation: random}", "{keep_attention: 1}")
    )
    found = look_at_texts(parse_recipe(text.replace("TEXT", str(path)).replace("HELD", str(path))))
    from limbeck.models.teacher import load_tokenizer

    tokens = len(load_tokenizer("embedded")("\n".join(read_documents(TextSource(str(path)))))["input_ids"])
    assert found.rows[0]["tokens"] == pytest.approx(tokens, rel=0.02)


def test_many_readings_are_warned_of_by_weight(tmp_path):
    path, other = write_jsonl(tmp_path / "a.jsonl", 40), write_jsonl(tmp_path / "b.jsonl", 40)
    found = look_at_texts(recipe(path, f"data.train=[{{source: {path}, weight: 9}}, {other}]"))
    one, two = (row["times_read"] for row in found.rows[:2])
    assert one == pytest.approx(9 * two, rel=0.02)
    assert len(found.warnings) == 1
    assert f"training reads {path} (train) about {one:.0f} times" in found.warnings[0]


def test_the_hub_and_stores_are_not_opened(tmp_path):
    found = look_at_texts(recipe("someone/some-texts"))
    assert found.rows[0] == {"text": "someone/some-texts (train)", "for": "training"}
    assert found.problems == []


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.txt", None, "a.txt: no such file or folder"),
        ("a.txt", b"", "a.txt (train) is empty"),
        ("a.txt", b"\xff\xfe\0", "not text"),
        ("a.csv", b"text\nabc\n", "unknown kind of file"),
        ("a.jsonl", b'{"body": "x"}\n', 'no field "text" (found: body)'),
        ("a.jsonl", b"nothing\n", "a.jsonl:1: not JSON"),
        ("a.parquet", b"nothing", "not a readable Parquet file"),
    ],
)
def test_what_run_would_refuse_is_refused_with_the_facts(name, content, said, tmp_path):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(PlanError) as refused:
        plan(recipe(tmp_path / name), machine=ROOMY)
    assert said in str(refused.value)
    assert refused.value.facts["texts"]


def test_too_few_documents_to_hold_any_out(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", 12)
    found = look_at_texts(recipe(path, heldout=path))
    assert "Every 50th document is held out" in found.problems[0]


def test_a_file_that_may_not_be_read(tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", 2)

    def refuse(*words, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("limbeck.data.text.open", refuse, raising=False)
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(Permission denied\)"):
        list(read_documents(TextSource(str(path))))
