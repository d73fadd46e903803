import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
from tests.store.small_store import make_batches, make_store

from limbeck.core.files import sha256_file
from limbeck.store.manifest import read_manifest, write_manifest
from limbeck.store.verify import inspect_store, verify_store


@pytest.fixture
def folder(tmp_path):
    make_store(tmp_path / "s", values="uint8", k=5)
    return tmp_path / "s"


def problems(folder):
    return verify_store(folder)["problems"]


def forge(folder, change, shard=1):
    """Change a shard's table and make the manifest agree, as no accident would."""
    path = folder / "shards" / f"{shard:05d}.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    manifest = read_manifest(folder)
    facts = list(manifest.shards)
    facts[shard] = replace(facts[shard], bytes=path.stat().st_size, sha256=sha256_file(path))
    write_manifest(folder, manifest.with_shards(tuple(facts)))


def with_cell(name, row, value):
    def change(table):
        import pyarrow as pa

        values = table.column(name).to_pylist()
        values[row] = value(values[row])
        place = table.schema.get_field_index(name)
        return table.set_column(place, table.schema.field(name), pa.array(values, type=table.schema.field(name).type))

    return change


def test_a_sound_store(folder):
    facts = verify_store(folder)
    assert facts["problems"] == []
    assert (facts["rows"], facts["tokens"], facts["shards"]) == (18, 18 * 13, 5)


def test_several_problems_are_all_named(folder):
    (folder / "shards" / "00000.parquet").unlink()
    shard = folder / "shards" / "00003.parquet"
    shard.write_bytes(shard.read_bytes()[:-1])
    (folder / "shards" / "00009.parquet").write_bytes(b"")
    found = problems(folder)
    assert len(found) == 3
    for words in (
        "00000.parquet: the shard is missing",
        "00003.parquet",
        "00009.parquet: a shard that the manifest does not list",
    ):
        assert any(words in problem for problem in found), words


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (with_cell("input_ids", 1, lambda ids: [ids[0] ^ 1, *ids[1:]]), "row 1: its key is"),
        (with_cell("key", 2, lambda key: "0" * 32), "row 2: its key is 0000"),
        (with_cell("text", 0, lambda text: text + b"!"), "row 0: the bytes of its tokens are not"),
        (with_cell("token_bytes", 0, lambda lengths: None), "row 0: it has text without"),
        (with_cell("target_gap_0", 3, lambda plane: b"\xff" * len(plane)), "row 3: target column gap"),
        (with_cell("target_range_1", 3, lambda plane: plane[:-1]), "row 3: target column range_1"),
        (with_cell("document_starts", 3, lambda starts: [*starts, 500]), "row 3"),
        (lambda table: table.slice(0, 3), "3 rows"),
        (lambda table: table.drop_columns(["target_tail_0"]), "target_tail_0"),
    ],
)
def test_forged_shards(folder, change, words):
    forge(folder, change)
    assert any(words in problem for problem in problems(folder)), problems(folder)


def test_a_row_twice(folder):
    import shutil

    manifest = read_manifest(folder)
    shutil.copy(folder / "shards/00000.parquet", folder / "shards/00001.parquet")
    twice = replace(manifest.shards[0], file="shards/00001.parquet")
    write_manifest(folder, manifest.with_shards((manifest.shards[0], twice, *manifest.shards[2:])))
    assert sum("occurs twice" in problem for problem in problems(folder)) == 4


def test_no_store_and_newer_ones(tmp_path, folder):
    assert "not a target store" in problems(tmp_path)[0]
    words = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(words | {"schema": 9}))
    assert "schema 9" in problems(folder)[0]
    (folder / "manifest.json").write_text(
        json.dumps(words | {"codec": words["codec"] | {"format": "limbeck-targets-9"}})
    )
    assert "limbeck-targets-9" in problems(folder)[0]


def test_unfinished(folder):
    (folder / "progress").mkdir()
    assert "stopped before its end" in problems(folder)[0]


def test_inspect_says_where_the_bytes_go(folder):
    facts = inspect_store(folder)
    assert facts["rows"] == 18
    assert facts["scored_tokens"] == sum(batch.target_count for batch in make_batches())
    assert facts["finished"]
    assert facts["fidelity"]["positions"] > 0
    columns = facts["bytes_per_token_by_column"]
    assert {"key", "input_ids", "text", "target_gap", "target_value", "next_log_prob"} <= set(columns)
    assert 0 < sum(columns.values()) < facts["bytes_per_token"] == facts["bytes"] / facts["tokens"]
    json.dumps(facts)
    assert np.isfinite(list(columns.values())).all()
