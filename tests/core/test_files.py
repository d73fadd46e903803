"""Files are whole or absent, and a full disk is explained."""

import errno
import os

import pytest

from limbeck.core import files
from limbeck.core.errors import CheckpointError, EnvironmentFault, unknown_name


def test_write_and_read(tmp_path):
    files.write_json(tmp_path / "a" / "b.json", {"x": [1, 2.5, "é"]})
    assert files.read_json(tmp_path / "a" / "b.json") == {"x": [1, 2.5, "é"]}


def test_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    target = tmp_path / "f.txt"
    files.write_atomic(target, "old")

    def full(*_args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(EnvironmentFault, match=r"No space left.*MB free"):
        files.write_atomic(target, "new")
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["f.txt"]


def test_nan_is_refused(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "f.json", {"x": float("nan")})


def test_damaged_json_is_named(tmp_path):
    (tmp_path / "f.json").write_text('{"x": ')
    with pytest.raises(CheckpointError, match=r"f\.json is not readable JSON"):
        files.read_json(tmp_path / "f.json")


def test_unknown_name_suggests():
    message = unknown_name("objective", "forwrad_kl", ["forward_kl", "reverse_kl"])
    assert 'Did you mean "forward_kl"?' in message
    assert "Known: forward_kl, reverse_kl" in message
