import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.store import small_store
from tests.store.small_store import VOCABULARY, SmallTeacher, files_of, make_batches, make_store, settings
from torch.testing import assert_close

from limbeck.core.errors import DataError, EnvironmentFault, StoreError, TeacherError
from limbeck.core.types import Batch, DenseTargets, SparseTargets, Targets
from limbeck.store.codec import CodecSettings
from limbeck.store.store import TargetStore
from limbeck.store.verify import verify_store
from limbeck.teachers.capture import CaptureSettings, capture
from limbeck.teachers.fidelity import measure_fidelity
from limbeck.teachers.largest import keep_largest, largest


def test_what_is_kept_by_hand():
    probs = torch.tensor([[0.5, 0.125, 0.25, 0.125], [0.1, 0.2, 0.3, 0.4]])
    kept = keep_largest(probs.log() + 3.0, torch.tensor([1, 3]), k=2)
    assert kept["ids"].tolist() == [[0, 2], [3, 2]]
    assert_close(kept["log_probs"].exp(), torch.tensor([[0.5, 0.25], [0.4, 0.3]]))
    assert_close(kept["tail"].exp(), torch.tensor([0.25, 0.3]))
    assert_close(kept["next_log_prob"].exp(), torch.tensor([0.125, 0.4]))


@pytest.mark.parametrize(("vocabulary", "k"), [(7, 3), (7, 7), (640, 5), (1000, 3), (1031, 7)])
def test_what_is_kept_against_float64(vocabulary, k):
    logits = 5 * torch.randn(70, vocabulary)
    following = torch.randint(0, vocabulary, (70,))
    kept = keep_largest(logits, following, k=k)
    log_probs = logits.double().log_softmax(-1)
    for row in range(70):
        order = log_probs[row].argsort(descending=True)
        assert kept["ids"][row].tolist() == order[:k].tolist()
        assert_close(kept["log_probs"][row].double(), log_probs[row][order[:k]], atol=2e-6, rtol=1e-6)
        assert_close(kept["tail"][row].double(), log_probs[row][order[k:]].logsumexp(0), atol=2e-6, rtol=1e-6)
        assert_close(kept["next_log_prob"][row].double(), log_probs[row][following[row]], atol=2e-6, rtol=1e-6)


def test_what_a_sure_teacher_leaves_is_not_lost_to_rounding():
    logits = torch.zeros(1, 100)
    logits[0, 7] = 60.0
    kept = keep_largest(logits, torch.tensor([7]), k=1)
    assert_close(kept["tail"], torch.tensor([np.log(99) - 60], dtype=torch.float32))
    assert kept["log_probs"].item() == 0
    assert keep_largest(logits, torch.tensor([7]), k=100)["tail"].item() == -torch.inf


def test_the_largest_of_equal_and_of_masked_logits():
    logits = torch.zeros(3, 1000)
    values, ids = largest(logits, k=4)
    assert (values == 0).all()
    assert all(len(set(row)) == 4 for row in ids.tolist())
    logits[:, 2:] = -torch.inf
    values, ids = largest(logits, k=4)
    assert values.tolist() == [[0, 0, -torch.inf, -torch.inf]] * 3
    assert sorted(ids[0, :2].tolist()) == [0, 1]


def test_the_store_holds_what_the_teacher_says(tmp_path):
    facts = make_store(tmp_path / "s", hidden=(2,))
    teacher, store, number = SmallTeacher(), TargetStore(tmp_path / "s"), 0
    assert (facts["rows"], facts["tokens"], facts["new_rows"], facts["shards"]) == (18, 234, 18, 5)
    for batch in make_batches():
        log_probs = teacher.log_probs(batch)
        for row in range(3):
            record = store.row(number, layers=(2,))
            said = np.append(batch.loss_mask_BT[row, 1:].numpy(), False)
            expected, order = log_probs[row][said].sort(descending=True)
            assert_close(torch.from_numpy(record.log_probs[said]), expected)
            assert (record.ids[said] == order.numpy()).all()
            assert np.isneginf(record.tail[said]).all()
            following = log_probs[row, :-1].gather(-1, batch.input_ids_BT[row, 1:, None])[:, 0]
            assert_close(torch.from_numpy(record.next_log_prob[said]), following[said[:-1]], rtol=2**-10, atol=1e-6)
            assert_close(torch.from_numpy(record.hidden[2]), 2 * teacher.hidden(batch)[row], rtol=2**-10, atol=1e-4)
            assert record.text == b"".join(small_store.TOKEN_BYTES[token] for token in record.input_ids)
            assert record.token_bytes.tolist() == [len(small_store.TOKEN_BYTES[token]) for token in record.input_ids]
            number += 1
    assert verify_store(tmp_path / "s")["problems"] == []


def test_each_row_once(tmp_path):
    batches = make_batches()
    facts = make_store(tmp_path / "twice", [*batches[:3], *batches])
    assert (facts["new_rows"], facts["duplicates"]) == (18, 9)
    make_store(tmp_path / "once", batches)
    assert files_of(tmp_path / "twice") == files_of(tmp_path / "once")


def test_appended_rows(tmp_path):
    batches = make_batches(8)
    make_store(tmp_path / "s", batches[:3])
    before = files_of(tmp_path / "s")
    facts = make_store(tmp_path / "s", batches)
    assert (facts["rows"], facts["new_rows"], facts["duplicates"]) == (24, 15, 9)
    after = files_of(tmp_path / "s")
    assert all(after[name] == content for name, content in before.items() if name.startswith("shards"))
    assert TargetStore(tmp_path / "s").manifest.captures == (0, 3)
    assert verify_store(tmp_path / "s")["problems"] == []


def test_nothing_new_changes_nothing(tmp_path):
    make_store(tmp_path / "s")
    before = files_of(tmp_path / "s")
    teacher = SmallTeacher()
    facts = make_store(tmp_path / "s", source=teacher)
    assert (facts["new_rows"], facts["rows"], facts["finished"], teacher.calls) == (0, 18, True, 0)
    assert files_of(tmp_path / "s") == before


@pytest.mark.parametrize("calls", [0, 1, 2, 3, 5, 8, 99])
@pytest.mark.parametrize("append", [False, True])
def test_a_stopped_capture_goes_on_to_the_same_files(tmp_path, calls, append):
    batches = make_batches(8)
    for name in ("whole", "stopped"):
        if append:
            make_store(tmp_path / name, batches[:3])
    make_store(tmp_path / "whole", batches)
    answers = []

    def should_stop():
        answers.append(len(answers) == calls)
        return answers[-1]

    facts = make_store(tmp_path / "stopped", batches, should_stop=should_stop)
    assert facts["finished"] == (not any(answers))
    if any(answers):
        with pytest.raises(StoreError, match="stopped before its end"):
            TargetStore(tmp_path / "stopped")
    assert make_store(tmp_path / "stopped", batches)["finished"]
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_a_stop_between_the_manifest_and_the_end(tmp_path, monkeypatch):
    for name in ("whole", "stopped"):
        make_store(tmp_path / name, make_batches(3))
    make_store(tmp_path / "whole")
    rename = Path.rename

    def die(path, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "rename", die)
    with pytest.raises(KeyboardInterrupt):
        make_store(tmp_path / "stopped")
    monkeypatch.setattr(Path, "rename", rename)
    make_store(tmp_path / "stopped")
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_a_damaged_shard_of_a_stopped_capture_is_made_again(tmp_path):
    make_store(tmp_path / "whole")
    left = iter(range(5))
    make_store(tmp_path / "stopped", should_stop=lambda: next(left, None) is None)
    shard = tmp_path / "stopped" / "shards" / "00000.parquet"
    shard.write_bytes(b"PAR1" + shard.read_bytes()[4:-9])
    (tmp_path / "stopped" / "shards" / ".00001.parquet.0123.tmp").write_bytes(b"half")
    make_store(tmp_path / "stopped")
    assert files_of(tmp_path / "stopped") == files_of(tmp_path / "whole")


def test_other_text_or_settings_after_a_stop(tmp_path):
    left = iter(range(5))
    make_store(tmp_path / "s", should_stop=lambda: next(left, None) is None)
    with pytest.raises(StoreError, match="had other text in shard 0"):
        make_store(tmp_path / "s", make_batches(seed=4))
    with pytest.raises(StoreError, match="codec"):
        make_store(tmp_path / "s", k=3)
    with pytest.raises(StoreError, match="rows to a shard"):
        make_store(tmp_path / "s", rows_per_shard=5)
    with pytest.raises(StoreError, match="teacher f00d against beef"):
        make_store(tmp_path / "s", teacher={"name": "small", "fingerprint": "beef"})


class Broken(SmallTeacher):
    """Logits of another kind after a few batches."""

    def __init__(self, value, *, after=2):
        super().__init__()
        self.value, self.after = value, after

    def targets(self, batch):
        found = super().targets(batch)
        if self.calls > self.after:
            found.logits.hidden_BTD[0, 3, 2] = self.value
        return found


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_logits_that_are_not_numbers(tmp_path, value):
    make_store(tmp_path / "whole")
    with pytest.raises(TeacherError, match="not numbers"):
        make_store(tmp_path / "s", source=Broken(value))
    make_store(tmp_path / "s")
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


def test_a_teacher_of_another_vocabulary(tmp_path):
    teacher = SmallTeacher()
    teacher.vocabulary_size = 64
    with pytest.raises(TeacherError, match="vocabulary of 64, but the store is for 50"):
        make_store(tmp_path / "s", source=teacher)
    teacher = SmallTeacher()
    teacher.weight = teacher.weight[:, :40]
    with pytest.raises(TeacherError, match="40 logits where its vocabulary is 50"):
        make_store(tmp_path / "s", source=teacher)


def test_no_batches(tmp_path):
    with pytest.raises(DataError, match="nothing to capture"):
        capture(SmallTeacher(), [], tmp_path / "s", settings=settings(), teacher={}, tokenizer=None)


def test_layers_the_teacher_does_not_give(tmp_path):
    class Shallow(SmallTeacher):
        def targets(self, batch):
            return Targets(super().targets(batch).logits)

    with pytest.raises(TeacherError, match=r"no hidden states of layers \[2\]"):
        make_store(tmp_path / "s", source=Shallow(), hidden=(2,))


def test_a_full_disk_stops_the_capture(tmp_path, monkeypatch):
    from limbeck.store import writing

    whole = writing.write_atomic

    def full(path, content):
        if path.name == "00002.parquet":
            raise EnvironmentFault("no space")
        whole(path, content)

    monkeypatch.setattr(writing, "write_atomic", full)
    with pytest.raises(EnvironmentFault, match="no space"):
        make_store(tmp_path / "s", make_batches(40))
    monkeypatch.undo()
    make_store(tmp_path / "s", make_batches(40))
    make_store(tmp_path / "whole", make_batches(40))
    assert files_of(tmp_path / "s") == files_of(tmp_path / "whole")


def test_progress_counts_every_token_once(tmp_path):
    told = []
    left = iter(range(5))
    make_store(tmp_path / "s", should_stop=lambda: next(left, None) is None)
    make_store(tmp_path / "s", advance=lambda tokens, note: told.append(tokens))
    assert sum(told) == 18 * 13


class Sparse(SmallTeacher):
    """The same teacher when it tells its likeliest tokens only, in no order."""

    def __init__(self, k, *, weighted=False):
        super().__init__()
        self.k, self.weighted = k, weighted

    def targets(self, batch):
        log_probs = self.log_probs(batch)
        top = log_probs.topk(self.k, dim=-1)
        tail = log_probs.scatter(-1, top.indices, -torch.inf).logsumexp(-1)
        weights = top.values.flip(-1).exp() if self.weighted else None
        features = {"next_log_prob": log_probs.gather(-1, batch.input_ids_BT.roll(-1, 1)[..., None])[..., 0]}
        return Targets(SparseTargets(top.indices.flip(-1), top.values.flip(-1), tail, weights), features=features)


def test_a_teacher_that_tells_some_entries_only(tmp_path):
    make_store(tmp_path / "dense", k=6)
    facts = make_store(tmp_path / "sparse", source=Sparse(6), k=6)
    one, two = (TargetStore(tmp_path / name) for name in ("dense", "sparse"))
    for number in range(18):
        a, b = one.row(number), two.row(number)
        np.testing.assert_array_equal(a.ids, b.ids)
        np.testing.assert_allclose(a.log_probs, b.log_probs, atol=1e-5)
        np.testing.assert_allclose(a.tail, b.tail, atol=1e-5)
        np.testing.assert_allclose(a.next_log_prob, b.next_log_prob, atol=1e-5, rtol=2**-9)
    assert facts["fidelity"]["mean_kl_nats"] < 1e-6
    assert facts["fidelity"]["mean_tail_kl_nats"] is None


def test_sampled_targets(tmp_path):
    codec = CaptureSettings(CodecSettings(VOCABULARY, values="float32", k=6, sampled=True), fidelity_tokens=0)
    words = {"settings": codec, "teacher": small_store.TEACHER, "tokenizer": None}
    with pytest.raises(StoreError, match="whole distributions"):
        capture(SmallTeacher(), make_batches(), tmp_path / "s", **words)
    source = Sparse(6, weighted=True)
    capture(source, make_batches(), tmp_path / "s", **words)
    row = TargetStore(tmp_path / "s").row(0)
    expected = source.targets(make_batches()[0]).logits.weights_BTK[0].flip(-1)
    np.testing.assert_array_equal(row.weights[:-1], expected[:-1])


def test_fidelity_of_a_good_store(tmp_path):
    report = make_store(tmp_path / "s", k=VOCABULARY)["fidelity"]
    assert abs(report["mean_kl_nats"]) < 1e-6
    assert report["top1_agreement"] == report["mean_mass_kept"] == 1.0
    assert report["mean_tail_kl_nats"] == 0
    assert report["positions"] >= 40
    store = TargetStore(tmp_path / "s")
    assert report["bytes_per_token"] == pytest.approx(store.manifest.bytes / 234, rel=1e-5)
    assert store.manifest.fidelity == report


def test_fidelity_by_hand(tmp_path):
    make_store(tmp_path / "s", k=3, values="uint8")
    store, teacher = TargetStore(tmp_path / "s"), SmallTeacher()
    report = measure_fidelity(teacher, store, tokens=10_000, device="cpu")
    kls, masses, tails, number = [], [], [], 0
    for batch in make_batches():
        log_probs = (teacher.hidden(batch) @ teacher.weight).double().log_softmax(-1)
        for row in range(3):
            record = store.row(number)
            number += 1
            for t in range(12):
                if not batch.loss_mask_BT[row, t + 1]:
                    continue
                true = log_probs[row, t].exp()
                kept = torch.from_numpy(record.ids[t])
                rest = torch.ones(VOCABULARY, dtype=torch.bool).scatter(0, kept, False)
                kl = sum(true[i] * (true[i].log() - float(d)) for i, d in zip(kept, record.log_probs[t], strict=True))
                kls.append(float(kl + true[rest].sum() * (true[rest].sum().log() - float(record.tail[t]))))
                masses.append(float(true[kept].sum()))
                tails.append(float((true[rest] * (true[rest] / (true[rest].sum() / 47)).log()).sum()))
    assert report["positions"] == len(kls)
    assert report["mean_kl_nats"] == pytest.approx(np.mean(kls), rel=1e-3)
    assert report["p99_kl_nats"] == pytest.approx(np.quantile(kls, 0.99), rel=1e-3)
    assert report["max_kl_nats"] == pytest.approx(max(kls), rel=1e-3)
    assert report["mean_mass_kept"] == pytest.approx(np.mean(masses), rel=1e-5)
    assert report["mean_tail_kl_nats"] == pytest.approx(np.mean(tails), rel=1e-5)


def test_fidelity_sees_another_teacher_and_a_shifted_store(tmp_path):
    make_store(tmp_path / "s", k=8)
    store = TargetStore(tmp_path / "s")
    assert measure_fidelity(SmallTeacher(), store, tokens=300, device="cpu")["mean_kl_nats"] < 1e-6
    other = measure_fidelity(SmallTeacher(scale=1.01), store, tokens=300, device="cpu")
    assert other["mean_kl_nats"] > 1e-5

    class Shifted(SmallTeacher):
        def targets(self, batch):
            dense = super().targets(batch).logits
            return Targets(DenseTargets(dense.hidden_BTD.roll(1, dims=1), dense.head))

    shifted = measure_fidelity(Shifted(), store, tokens=300, device="cpu")
    assert shifted["mean_kl_nats"] > 0.1
    assert shifted["top1_agreement"] < 0.9


def test_a_batch_is_scored_as_it_was_given(tmp_path):
    """Documents and positions reach the teacher; a row of another batch does not."""
    seen = []

    class Watching(SmallTeacher):
        def targets(self, batch):
            seen.append(batch)
            return super().targets(batch)

    make_store(tmp_path / "s", source=Watching(), rows_per_shard=3, fidelity_tokens=0)
    for given, got in zip(make_batches(), seen, strict=True):
        assert torch.equal(given.input_ids_BT, got.input_ids_BT)
        for name in ("document_ids_BT", "position_ids_BT"):
            one, two = getattr(given, name), getattr(got, name)
            assert (one is None) == (two is None)
            assert one is None or torch.equal(one, two)


def run(folder, *, seconds=0.0, processes=1):
    command = [sys.executable, "-m"]
    if processes > 1:
        command += ["torch.distributed.run", f"--nproc-per-node={processes}", "--master-port=29517", "-m"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(["src", ".", *sys.path])}
    return subprocess.Popen(
        [*command, "tests.store.small_store", str(folder), str(seconds)], cwd=Path(__file__).parents[2], env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
    )  # fmt: skip


@pytest.mark.slow
def test_kill_at_any_moment_and_again(tmp_path):
    whole = run(tmp_path / "whole")
    assert whole.wait() == 0, whole.stderr.read()
    chance = random.Random(5)
    seen = set()
    for number in range(5):
        process = run(tmp_path / "killed", seconds=0.15)
        shards = tmp_path / "killed" / "shards"
        begun = time.monotonic()
        while not (shards.exists() and len(list(shards.glob("*.parquet"))) > 2 * number) and process.poll() is None:
            assert time.monotonic() - begun < 120
            time.sleep(0.01)
        time.sleep(chance.random() * 0.2)
        process.send_signal(signal.SIGKILL if number % 2 == 0 else signal.SIGTERM)
        process.wait()
        seen.add(len(list(shards.glob("*.parquet"))))
    assert len(seen) > 2, "the kills fell at different moments"
    last = run(tmp_path / "killed")
    assert last.wait() == 0, last.stderr.read()
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")
    assert verify_store(tmp_path / "killed")["problems"] == []


@pytest.mark.slow
def test_two_processes_write_the_files_of_one(tmp_path):
    for processes in (1, 2):
        process = run(tmp_path / str(processes), processes=processes)
        assert process.wait() == 0, process.stderr.read().decode()
    assert files_of(tmp_path / "2") == files_of(tmp_path / "1")
    assert verify_store(tmp_path / "2")["problems"] == []


def test_the_number_of_processes_does_not_matter(tmp_path, monkeypatch):
    """The same without processes: rank after rank on one folder, the main one last."""
    make_store(tmp_path / "one")
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in ("1", "2", "0"):
        monkeypatch.setenv("RANK", rank)
        if rank != "0":
            (tmp_path / "three" / "progress").mkdir(parents=True, exist_ok=True)
        make_store(tmp_path / "three")
    assert files_of(tmp_path / "three") == files_of(tmp_path / "one")


def test_a_shard_that_no_process_wrote(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(StoreError, match="shard 1 was not written"):
        make_store(tmp_path / "s")


def test_batches_without_anything_scored(tmp_path):
    batch = make_batches(1)[0]
    silent = Batch(batch.input_ids_BT, torch.zeros_like(batch.loss_mask_BT))
    facts = make_store(tmp_path / "s", [silent])
    assert facts["fidelity"] == {"positions": 0}
    assert verify_store(tmp_path / "s")["problems"] == []
