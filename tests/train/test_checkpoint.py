"""Checkpoints: whole or absent, checked before use, the newest intact one taken."""

import json
import os

import pytest
import torch

from limbeck.core.errors import CheckpointError, EnvironmentFault
from limbeck.train.checkpoint import Checkpoint, load_checkpoint, newest_checkpoint, save_checkpoint


def checkpoint(step):
    return Checkpoint(step, {"model": {"w": torch.full((3,), float(step))}, "optimizer": {}}, {"seconds": 1.5})


def test_round_trip_and_keep(tmp_path):
    for step in (1, 2, 3):
        save_checkpoint(tmp_path, checkpoint(step), keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000002", "step-00000003"]
    newest = newest_checkpoint(tmp_path)
    assert newest.step == 3
    assert newest.facts == {"seconds": 1.5}
    assert torch.equal(newest.tensors["model"]["w"], torch.full((3,), 3.0))


def test_none_yet(tmp_path):
    assert newest_checkpoint(tmp_path / "nowhere") is None


def flip(path):
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize("damage", [flip, truncate, lambda path: path.unlink()])
@pytest.mark.parametrize("name", ["model.safetensors", "state.json", "manifest.json"])
def test_a_damaged_newest_gives_way_to_the_one_before(tmp_path, damage, name):
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    damage(save_checkpoint(tmp_path, checkpoint(2), keep=2) / name)
    with pytest.warns(UserWarning, match="step-00000002"):
        assert newest_checkpoint(tmp_path).step == 1


def test_all_damaged_is_an_error_with_a_way_out(tmp_path):
    truncate(save_checkpoint(tmp_path, checkpoint(1), keep=2) / "model.safetensors")
    with (
        pytest.warns(UserWarning, match="Trying the one before"),
        pytest.raises(CheckpointError, match="Remove that folder"),
    ):
        newest_checkpoint(tmp_path)


def test_a_manifest_may_not_reach_outside(tmp_path):
    path = save_checkpoint(tmp_path, checkpoint(1), keep=1)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"]["../secret.safetensors"] = "0"
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="secret"):
        load_checkpoint(path)


@pytest.mark.parametrize("failing", ["rename", "fsync"])
def test_a_failed_save_keeps_the_old_one_and_leaves_no_rubbish(tmp_path, monkeypatch, failing):
    save_checkpoint(tmp_path, checkpoint(1), keep=2)

    def full(*_args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, failing, full)
    with pytest.raises(EnvironmentFault, match="No space left"):
        save_checkpoint(tmp_path, checkpoint(2), keep=2)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]
    assert newest_checkpoint(tmp_path).step == 1


def test_half_written_folders_are_never_looked_at(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1), keep=2)
    (tmp_path / ".step-00000002.tmp").mkdir()
    (tmp_path / "step-junk").mkdir()
    assert newest_checkpoint(tmp_path).step == 1
