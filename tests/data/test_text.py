"""Sources: what is read, and what is refused with a way out."""

import json

import pyarrow
import pyarrow.parquet
import pytest

from limbeck.core.errors import DataError
from limbeck.data.factbook import SPLITS, read_factbook
from limbeck.data.text import TextSource, read_documents


def test_factbook_splits_are_disjoint_and_named_by_their_country():
    splits = {split: list(read_factbook(split)) for split in SPLITS}
    titles = {split: {text.splitlines()[0] for text in texts} for split, texts in splits.items()}
    assert sum(map(len, splits.values())) == 256
    assert not titles["train"] & titles["heldout"]
    assert not titles["valid"] & titles["heldout"]
    assert len(splits["heldout"]) >= 12
    assert all("<b>" not in text for text in splits["heldout"])


def test_plain_text_in_documents(tmp_path):
    file = tmp_path / "a.txt"
    paragraph = "word " * 500
    file.write_text(f"{paragraph}\n\n{paragraph}\n\nend\n")
    documents = list(read_documents(TextSource(str(file), split="all")))
    assert len(documents) == 3
    assert "".join(documents) == file.read_text()


def test_jsonl_and_parquet_agree(tmp_path):
    rows = [{"body": f"text {i}"} for i in range(5)]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    read = [
        list(read_documents(TextSource(str(tmp_path / name), split="all", field="body")))
        for name in ("a.jsonl", "a.parquet")
    ]
    assert read[0] == read[1] == [row["body"] for row in rows]


def test_train_and_heldout_partition_a_file(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": str(i)}) for i in range(120)))
    parts = {
        split: list(read_documents(TextSource(str(tmp_path / "a.jsonl"), split=split)))
        for split in ("train", "heldout", "all")
    }
    assert len(parts["heldout"]) == 2
    assert sorted(parts["train"] + parts["heldout"]) == sorted(parts["all"])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"caf\xe9 au lait\n", "a.txt:1: not UTF-8"),
        ("a.txt", b"fine\nnot\0fine\n", "a.txt:2: this is not text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', "a.jsonl:2: not JSON"),
        ("a.jsonl", b'{"body": "x"}\n', r'no field "text" \(found: body\)'),
        ("a.jsonl", b'{"text": 5}\n', "holds int, not text"),
        ("a.parquet", b"PAR0 nonsense", "not a readable Parquet file"),
    ],
)
def test_bad_files_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_documents(TextSource(str(tmp_path / name), split="all")))


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(DataError, match="no such file"):
        list(read_documents(TextSource(str(tmp_path / "none.txt"))))
    with pytest.raises(DataError, match="folder holds no"):
        list(read_documents(TextSource(str(tmp_path))))
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match='not "test"'):
        list(read_documents(TextSource(str(tmp_path / "a.txt"), split="test")))
    with pytest.raises(DataError, match="Did you mean"):
        list(read_documents(TextSource("factbook", split="held")))


def test_unreachable_hub_says_what_to_do():
    with pytest.raises(DataError, match="give the path of a local"):
        list(read_documents(TextSource("nobody/no-such-data-set")))


def test_rows_that_are_lines_are_gathered(tmp_path):
    lines = ["= Title =", "word " * 450, "", "= Next =", "end"]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    rows = list(read_documents(TextSource(str(tmp_path / "a.jsonl"), split="all", rows="lines")))
    assert rows == ["= Title =\n" + "word " * 450 + "\n", "\n= Next =\nend\n"]
