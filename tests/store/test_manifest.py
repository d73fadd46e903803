import json

import pytest
from tests.store.small_store import make_store

from limbeck.core.errors import StoreError
from limbeck.store.manifest import MANIFEST, Manifest, ShardFacts, read_manifest, write_manifest


@pytest.fixture
def words(tmp_path):
    manifest = Manifest(
        "targets", {"name": "small", "fingerprint": "f"}, "t", 50, {"format": "x"}, {"2": 8}, context_tokens=13, rows_per_shard=4,
        shards=(ShardFacts("shards/00000.parquet", 4, 52, 48, 999, "ab"),), fidelity={"positions": 3},
    )  # fmt: skip
    write_manifest(tmp_path, manifest)
    assert read_manifest(tmp_path) == manifest
    return json.loads((tmp_path / MANIFEST).read_text())


def refused(tmp_path, words, match):
    (tmp_path / MANIFEST).write_text(words if isinstance(words, str) else json.dumps(words))
    with pytest.raises(StoreError, match=match):
        read_manifest(tmp_path)


def test_a_newer_schema_is_refused(tmp_path, words):
    refused(tmp_path, words | {"schema": 2}, "schema 2, and this version of limbeck reads up to 1")


def test_no_store(tmp_path):
    with pytest.raises(StoreError, match="not a target store"):
        read_manifest(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"kind": "logits"}, "kind"),
        ({"schema": "1"}, "schema"),
        ({"surprise": 1}, "surprise"),
        ({"shards": [{"file": "shards/00000.parquet"}]}, "damaged"),
        ({"shards": 3}, "damaged"),
        ({"teacher": None}, "teacher"),
        ({"codec": None}, "codec"),
        ({"vocabulary_size": -3}, "vocabulary"),
        ({"rows_per_shard": True}, "rows_per_shard"),
        ({"hidden_width": {"two": 8}}, "damaged"),
    ],
)
def test_damaged_manifests(tmp_path, words, changes, match):
    refused(tmp_path, words | changes, match)


@pytest.mark.parametrize("file", ["../../etc/passwd", "/etc/passwd", "shards/../x.parquet", "shards/1.parquet", 7])
def test_shards_lie_in_the_store(tmp_path, words, file):
    shard = words["shards"][0] | {"file": file}
    refused(tmp_path, words | {"shards": [shard]}, "shard file")


def test_half_a_manifest(tmp_path, words):
    refused(tmp_path, json.dumps(words)[:100], "not readable JSON")


def test_it_says_nothing_about_when_or_where(tmp_path):
    make_store(tmp_path / "one")
    make_store(tmp_path / "elsewhere" / "two")
    one, two = (folder / MANIFEST for folder in (tmp_path / "one", tmp_path / "elsewhere" / "two"))
    assert one.read_bytes() == two.read_bytes()
