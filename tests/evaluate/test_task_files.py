"""Files of items as people have them: which one is meant, every format, and what is said of spoilt ones."""

import base64
import contextlib
import gzip
import json

import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest
from tests.evaluate.task_files import ROWS

from limbeck.core.errors import EvaluationError
from limbeck.evaluate import task_files
from limbeck.evaluate.task_data import file_names, read_items
from limbeck.evaluate.task_files import search_folder

# As the hub's data sets have them, with the columns that nobody needs.
HUB_ROWS = {
    "boolq": {"question": "did ada meet bo", "passage": "Ada met Bo.", "idx": 0, "label": 1},
    "hellaswag": {
        "ind": 24, "activity_label": "Sitting", "ctx_a": "Ada met Bo.", "ctx_b": "", "ctx": "Ada met Bo.",
        "endings": ["sat.", "saw Bo.", "ran.", "met."], "source_id": "a~b", "split": "val", "split_type": "indomain", "label": "3",
    },
    "piqa": {"goal": "Sit on the mat.", "sol1": "Ada sat.", "sol2": "Bo met.", "label": 1},
    "sciq": {
        "question": "Who met Bo?", "distractor3": "Eli", "distractor1": "Cy", "distractor2": "Di", "correct_answer": "Ada",
        "support": "",
    },
    "arc_easy": {
        "id": "Mercury_1", "question": "What is it?", "choices": {"text": ["a cat", "a mat"], "label": ["A", "B"]}, "answerKey": "B",
    },
    "winogrande": {"sentence": "Ada saw Bo so _ ran.", "option1": "Ada", "option2": "Bo", "answer": "2"},
    "lambada_openai": {"text": "Bo saw Ada and Ada met Bo"},
    "wikitext": {"page": " = Ada = \n \n Ada met Bo . \n"},
    "blimp_wh_island": {"sentence_good": "Who saw Cy?", "sentence_bad": "Who Cy saw?", "UID": "wh_island", "pairID": 3},
}  # fmt: skip


def write_rows(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pyarrow.Table.from_pylist(rows)
    if path.name.endswith(".parquet"):
        pyarrow.parquet.write_table(table, path)
    elif path.name.endswith(".arrow"):
        with pyarrow.OSFile(str(path), "wb") as stream, pyarrow.ipc.new_stream(stream, table.schema) as writer:
            writer.write_table(table)
    else:
        lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return path


@pytest.mark.parametrize("suffix", task_files.SUFFIXES)
@pytest.mark.parametrize("task", HUB_ROWS)
def test_every_format_gives_the_same_items(task, suffix, tmp_path):
    row = HUB_ROWS[task]
    write_rows(tmp_path / "plain" / f"{task}.jsonl", [row] * 3)
    write_rows(tmp_path / "other" / f"{task}{suffix}", [row] * 3)
    plain, other = (read_items(task, search_folder(tmp_path / name)) for name in ("plain", "other"))
    assert other.rows == plain.rows
    assert other.sha256 == plain.sha256
    assert len(other.rows) == 3


def test_an_arrow_file_and_what_datasets_saves(tmp_path):
    from datasets import Dataset, DatasetDict

    row = HUB_ROWS["boolq"]
    table = pyarrow.Table.from_pylist([row] * 5)
    with (
        pyarrow.OSFile(str(tmp_path / "boolq.arrow"), "wb") as stream,
        pyarrow.ipc.new_file(stream, table.schema) as writer,
    ):
        writer.write_table(table, max_chunksize=2)
    assert len(read_items("boolq", search_folder(tmp_path)).rows) == 5
    hellaswag = Dataset.from_list([HUB_ROWS["hellaswag"]] * 4)
    saved = tmp_path / "saved" / "hellaswag"
    DatasetDict({"train": hellaswag.select(range(3)), "validation": hellaswag}).save_to_disk(
        str(saved), num_shards={"train": 1, "validation": 2}
    )
    (saved / "validation" / "cache-0123456789abcdef.arrow").write_bytes(b"not ours")
    for folder in (tmp_path, saved):
        items = read_items("hellaswag", search_folder(folder))
        assert [row["label"] for row in items.rows] == ["3"] * 4
        assert items.source.endswith("validation/data-00000-of-00002.arrow")
    (saved / "validation" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(EvaluationError, match="one of 2 pieces, of which 1 are there"):
        read_items("hellaswag", search_folder(saved))


@pytest.mark.parametrize(
    ("task", "path"),
    [
        ("boolq", "boolq/data-00000-of-00001.arrow"),
        ("boolq", "boolq/none/validation/data-00000-of-00001.arrow"),
        ("boolq", "super_glue/boolq/0.0.0/0af3/super_glue-validation.arrow"),
        ("hellaswag", "hellaswag/validation/0000.parquet"),
        ("hellaswag", "datasets--Rowan--hellaswag/snapshots/ab12/data/validation-00000-of-00001.parquet"),
        ("hellaswag", "Rowan___hellaswag/default/0.0.0/ab12/hellaswag-validation.arrow"),
        ("hellaswag", "hellaswag_val.jsonl"),
        ("arc_easy", "ai2_arc/ARC-Easy/test-00000-of-00001.parquet"),
        ("winogrande", "winogrande/winogrande_xl/validation-00000-of-00001.parquet"),
        ("blimp_wh_island", "nyu-mll___blimp/wh_island/0.0.0/ab12/blimp-train.arrow"),
        ("blimp_wh_island", "blimp/wh_island.parquet"),
        ("wikitext", "wikitext_document_level/wikitext-2-raw-v1/test-00000-of-00001.parquet"),
    ],
)
def test_the_places_where_such_files_lie(task, path, tmp_path):
    write_rows(tmp_path / path, [HUB_ROWS[task]] * 2)
    items = read_items(task, search_folder(tmp_path))
    assert items.source == f"file {path}"
    for other in {*HUB_ROWS, "arc_challenge"} - {task}:
        assert read_items(other, search_folder(tmp_path)) is None


@pytest.mark.parametrize(
    ("paths", "chosen"),
    [
        (("boolq/train.jsonl", "boolq/validation.jsonl", "boolq/test.jsonl"), "boolq/validation.jsonl"),
        (("boolq/train/a.parquet", "boolq/validation/a.parquet"), "boolq/validation/a.parquet"),
        (("boolq/train.jsonl", "boolq/dev.jsonl"), "boolq/dev.jsonl"),
        (("boolq-train.arrow", "boolq.jsonl"), "boolq.jsonl"),
        (("boolq.train.jsonl",), "boolq.train.jsonl"),
        (("boolq/piqa.jsonl", "boolq/boolq.jsonl"), "boolq/boolq.jsonl"),
        (("boolq.jsonl", "boolq.parquet"), None),
        (("boolq/validation.jsonl", "boolq/validation.parquet"), None),
        (("boolq/a.jsonl", "boolq/b.jsonl"), None),
        (("x/boolq/validation.jsonl", "y/boolq/validation.jsonl"), None),
    ],
)
def test_which_of_several_is_meant(paths, chosen, tmp_path):
    for path in paths:
        write_rows(tmp_path / path, [HUB_ROWS["boolq"]])
    if chosen is None:
        with pytest.raises(EvaluationError, match=r"boolq: 2 files could be its data \(.*Leave one of them"):
            read_items("boolq", search_folder(tmp_path))
    else:
        assert read_items("boolq", search_folder(tmp_path)).source == f"file {chosen}"


def test_sciq_takes_its_test_split_and_else_validation(tmp_path):
    for split in ("train", "validation"):
        write_rows(tmp_path / f"sciq/{split}-00000-of-00001.parquet", [HUB_ROWS["sciq"]])
    assert "validation" in read_items("sciq", search_folder(tmp_path)).source
    write_rows(tmp_path / "sciq/test-00000-of-00001.parquet", [HUB_ROWS["sciq"]])
    assert "test" in read_items("sciq", search_folder(tmp_path)).source


def test_the_size_of_winogrande_that_the_task_is_scored_on(tmp_path):
    for size in ("xs", "xl", "debiased"):
        write_rows(tmp_path / f"winogrande/winogrande_{size}/validation.parquet", [HUB_ROWS["winogrande"]])
    assert "winogrande_xl" in read_items("winogrande", search_folder(tmp_path)).source


def test_one_paradigm_is_not_taken_for_another(tmp_path):
    write_rows(tmp_path / "wh_vs_that_no_gap_long_distance.jsonl", [HUB_ROWS["blimp_wh_island"]])
    assert read_items("blimp_wh_vs_that_no_gap", search_folder(tmp_path)) is None


def test_what_would_be_found_is_said():
    assert file_names("boolq") == "boolq*.jsonl, .jsonl.gz, .parquet or .arrow, or such files in a folder boolq"
    assert "wiki.test.raw" in file_names("wikitext")
    assert file_names("blimp_wh_island") == file_names("blimp_causative")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"label": "yes"}, "a number from 0 to 1"),
        ({"label": 0.0}, "a number from 0 to 1"),
        ({"label": None}, "a number from 0 to 1"),
        ({"label": -1}, "a number from 0 to 1"),
        ({"passage": ["Ada"]}, "holds list, expected text"),
        ({"passage": b"Ada"}, "holds bytes, expected text"),
        ({"passage": None}, "holds NoneType, expected text"),
        ({"passage": "x" * (2**20 + 1)}, "a row of more than 1,048,576 bytes"),
    ],
)
@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_wrong_rows_of_a_table_are_refused(change, words, suffix, tmp_path):
    path = write_rows(tmp_path / f"boolq{suffix}", [HUB_ROWS["boolq"] | change])
    with pytest.raises(EvaluationError) as caught:
        read_items("boolq", search_folder(tmp_path))
    assert str(caught.value).startswith(f"{path}, row 1: ")
    assert words in str(caught.value)


def test_a_table_with_other_columns_is_refused_with_the_ones_it_has(tmp_path):
    write_rows(tmp_path / "hellaswag.parquet", [HUB_ROWS["boolq"]])
    with pytest.raises(
        EvaluationError, match=r'row 1: no column "activity_label" \(found: question, passage, idx, label\)'
    ):
        read_items("hellaswag", search_folder(tmp_path))


def _spoil(path, kind):
    good = path.read_bytes()
    middle = len(good) // 2
    spoilt = {
        "garbage": bytes(range(256)) * 8,
        "empty": b"",
        "short": b"PAR1",
        "half": good[:middle],
        "tail": good[middle:],
        "text": b'{"label": 1}\n',
    }
    path.write_bytes(spoilt[kind])


@pytest.mark.parametrize("kind", ["garbage", "empty", "short", "half", "tail", "text"])
@pytest.mark.parametrize("suffix", [".parquet", ".arrow", ".jsonl.gz"])
def test_spoilt_files_give_one_message(kind, suffix, tmp_path):
    path = write_rows(
        tmp_path / f"boolq{suffix}", [HUB_ROWS["boolq"] | {"idx": n, "passage": f"{n} met {n * n}"} for n in range(50)]
    )
    _spoil(path, kind)
    with pytest.raises(EvaluationError) as caught:
        read_items("boolq", search_folder(tmp_path))
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".parquet", ".arrow"])
def test_flipped_bytes_are_read_or_refused(suffix, tmp_path):
    path = write_rows(tmp_path / f"boolq{suffix}", [HUB_ROWS["boolq"]] * 4)
    good = path.read_bytes()
    for place in range(0, len(good), 7):
        path.write_bytes(good[:place] + bytes([good[place] ^ 0xFF]) + good[place + 1 :])
        with contextlib.suppress(EvaluationError):
            assert read_items("boolq", search_folder(tmp_path)).rows


def test_text_that_is_no_utf8_in_a_table(tmp_path):
    raw = pyarrow.array([b"Ada \xff\xfe"], pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"passage": raw, "question": ["q"], "label": [1]})
    pyarrow.parquet.write_table(table, tmp_path / "boolq.parquet")
    with pytest.raises(EvaluationError, match=r"boolq\.parquet: not a readable Parquet file \(.*UTF8"):
        read_items("boolq", search_folder(tmp_path))


def test_an_encrypted_file(tmp_path):
    from pyarrow.parquet import encryption

    class Keys(encryption.KmsClient):
        def __init__(self, _config):
            super().__init__()

        def wrap_key(self, key_bytes, _name):
            return base64.b64encode(key_bytes)

        def unwrap_key(self, wrapped, _name):
            return base64.b64decode(wrapped)

    settings = encryption.EncryptionConfiguration(footer_key="one", column_keys={"two": ["passage"]})
    locks = encryption.CryptoFactory(Keys).file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    table = pyarrow.Table.from_pylist([HUB_ROWS["boolq"]])
    with pyarrow.parquet.ParquetWriter(tmp_path / "boolq.parquet", table.schema, encryption_properties=locks) as writer:
        writer.write_table(table)
    with pytest.raises(EvaluationError, match=r"boolq\.parquet: not a readable Parquet file \(.*encrypt"):
        read_items("boolq", search_folder(tmp_path))


def test_what_unpacks_to_too_much(tmp_path, monkeypatch):
    rows = [HUB_ROWS["boolq"] | {"passage": "Ada met Bo. " * 500}] * 50
    monkeypatch.setattr(task_files, "MOST_FILE_BYTES", 100_000)
    for suffix in (".jsonl.gz", ".parquet"):
        path = write_rows(tmp_path / suffix[1:] / f"boolq{suffix}", rows)
        assert path.stat().st_size < 100_000
        with pytest.raises(EvaluationError, match="files of up to 100,000 are read, unpacked"):
            read_items("boolq", search_folder(path.parent))
    monkeypatch.setattr(task_files, "MOST_FILE_BYTES", 10_000_000)
    monkeypatch.setattr(task_files, "MOST_ROWS", 40)
    with pytest.raises(EvaluationError, match="row 41: more than 40 rows"):
        read_items("boolq", search_folder(tmp_path / "parquet"))


def test_a_table_without_rows(tmp_path):
    pyarrow.parquet.write_table(
        pyarrow.table({"passage": pyarrow.array([], pyarrow.string())}), tmp_path / "boolq.parquet"
    )
    with pytest.raises(EvaluationError, match="is empty"):
        read_items("boolq", search_folder(tmp_path))


def test_plain_files_still_win_by_name(tmp_path):
    assert "sub/sciq.test.jsonl" in ROWS
    write_rows(tmp_path / "sub" / "sciq.test.jsonl", ROWS["sub/sciq.test.jsonl"])
    assert read_items("sciq", search_folder(tmp_path)).source == "file sub/sciq.test.jsonl"


def test_an_arrow_file_that_claims_to_be_enormous(tmp_path):
    path = write_rows(tmp_path / "boolq.arrow", [HUB_ROWS["boolq"]])
    with pyarrow.OSFile(str(path)) as stream:
        *_, batch = (pyarrow.ipc.read_message(stream) for _ in range(2))
    said = batch.body.size.to_bytes(8, "little")
    path.write_bytes(path.read_bytes().replace(said, (2**60).to_bytes(8, "little")))
    with pytest.raises(EvaluationError, match=r"boolq\.arrow: not a readable Arrow file"):
        read_items("boolq", search_folder(tmp_path))
