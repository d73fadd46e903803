import pytest
from tests.store.small_store import files_of

from limbeck.core.errors import StoreError
from limbeck.store.manifest import Manifest
from limbeck.store.records import TextRecord
from limbeck.store.sink import RowSink
from limbeck.store.store import TargetStore
from limbeck.store.verify import verify_store

TEXTS = [TextRecord(f"Question {number}?", f"Answer {number}.") for number in range(11)]


def make_sink(folder, **words):
    return RowSink(folder, Manifest("text", {"name": "closed", "fingerprint": None}, rows_per_shard=4, **words))


def write(folder, texts=TEXTS):
    sink = make_sink(folder)
    for text in texts:
        sink(text)
    return sink


def test_texts_come_back(tmp_path):
    sink = write(tmp_path / "s", [*TEXTS, TEXTS[3]])
    manifest = sink.finish(teacher={"usage": {"prompt_tokens": 7}})
    assert (manifest.rows, sink.rows, sink.duplicates, len(manifest.shards)) == (11, 11, 1, 3)
    store = TargetStore(tmp_path / "s")
    assert [store.text(number) for number in range(11)] == TEXTS
    assert store.manifest.teacher["usage"] == {"prompt_tokens": 7}
    assert verify_store(tmp_path / "s")["problems"] == []
    with pytest.raises(StoreError, match="store of texts"):
        store.row(0)


@pytest.mark.parametrize("stop", [0, 3, 4, 9, 11])
def test_the_same_rows_again_after_a_stop(tmp_path, stop):
    write(tmp_path / "whole").finish()
    write(tmp_path / "stopped", TEXTS[:stop])
    written = (tmp_path / "stopped" / "shards").glob("*.parquet")
    before = {path.name: path.stat().st_mtime_ns for path in written}
    write(tmp_path / "stopped").finish()
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")
    for name, at in before.items():
        assert (tmp_path / "stopped" / "shards" / name).stat().st_mtime_ns == at, "a whole shard is not written twice"


def test_other_rows_after_a_stop_are_refused(tmp_path):
    write(tmp_path / "s", TEXTS[:5])
    with pytest.raises(StoreError, match="had other text in shard 0"):
        write(tmp_path / "s", TEXTS[1:])


def test_other_settings_after_a_stop_are_refused(tmp_path):
    write(tmp_path / "s", TEXTS[:5])
    with pytest.raises(StoreError, match="4 rows to a shard, now 5"):
        RowSink(tmp_path / "s", Manifest("text", {"name": "closed", "fingerprint": None}, rows_per_shard=5))


def test_rows_are_appended(tmp_path):
    write(tmp_path / "s", TEXTS[:5]).finish()
    sink = write(tmp_path / "s")
    assert sink.duplicates == 5
    manifest = sink.finish()
    assert manifest.captures == (0, 2)
    store = TargetStore(tmp_path / "s")
    assert [store.text(number) for number in range(11)] == TEXTS
    assert verify_store(tmp_path / "s")["problems"] == []


def test_a_folder_that_is_something_else(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="not empty and holds no store"):
        make_sink(tmp_path)


def test_a_store_of_another_kind(tmp_path):
    write(tmp_path / "s").finish()
    with pytest.raises(StoreError, match="teacher closed against other"):
        RowSink(tmp_path / "s", Manifest("text", {"name": "closed", "fingerprint": "other"}, rows_per_shard=4))
    with pytest.raises(StoreError, match="teacher closed against open"):
        RowSink(tmp_path / "s", Manifest("text", {"name": "open", "fingerprint": None}, rows_per_shard=4))


def test_an_endpoint_that_moved_goes_on_with_its_store(tmp_path):
    def sink(model, url):
        return RowSink(
            tmp_path / "s", Manifest("text", {"name": model, "url": url, "fingerprint": None}, rows_per_shard=4)
        )

    sink("m", "http://wrong/v1")
    sink("m", "http://right/v1")
    with pytest.raises(StoreError, match="other against m|m against other"):
        sink("other", "http://right/v1")
