"""One lesson, every composition of terms: against sums made by hand in float64, and through the loop that trains it."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.models.families import VOCABULARY, tiny_teacher, token_ids
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.core.runtime import StopRequest
from limbeck.core.types import AlignedText, Batch, DenseTargets, Targets
from limbeck.data.order import Mixture
from limbeck.data.windows import TokenWindows
from limbeck.models.projections import FeatureProjections
from limbeck.recipe_objectives import Ramp
from limbeck.teachers.live import LiveTeacher
from limbeck.teachers.own import EmaTeacher
from limbeck.teachers.several import SeveralTeachers
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.metrics import MetricsLog
from limbeck.train.trainer import StageSettings, train_stage

WIDTH, NARROW = 32, 24


def model_of(seed, *, width=WIDTH, dropout=0.0, dtype=torch.float64):
    """A GPT-NeoX of two blocks with an untied head."""
    config = AutoConfig.for_model(
        "gpt_neox", vocab_size=VOCABULARY, hidden_size=width, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=64, hidden_dropout=dropout, attention_dropout=dropout,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.to(dtype)


def packed():
    """Documents of 3 + 9 and of 6 + 4 + 2 tokens, and of each a token that does not count."""
    documents = torch.tensor([[0] * 3 + [1] * 9, [0] * 6 + [1] * 4 + [2] * 2])
    positions = torch.tensor([[*range(3), *range(9)], [*range(6), *range(4), *range(2)]])
    mask = positions > 0
    mask[0, 7] = mask[1, 4] = False
    return Batch(token_ids(2, 12), mask, documents, positions)


def documents_of(batch):
    """(row, low, high) of every document."""
    for row, ids in enumerate(batch.document_ids_BT.tolist()):
        for document in sorted(set(ids)):
            low = ids.index(document)
            yield row, low, low + ids.count(document)


def scored(batch):
    """(row, t) of the tokens that count."""
    rows, width = batch.input_ids_BT.shape
    return [(b, t) for b in range(rows) for t in range(1, width) if batch.loss_mask_BT[b, t]]


def by_place(model, batch):
    """Logits and first-block states by (row, position), each document read by itself."""
    logits, hidden = {}, {}
    for row, low, high in documents_of(batch):
        said = model(batch.input_ids_BT[row : row + 1, low:high], output_hidden_states=True)
        for t in range(low, high):
            logits[row, t], hidden[row, t] = said.logits[0, t - low], said.hidden_states[1][0, t - low]
    return logits, hidden


def kl_by_hand(teacher_V, student_V, temperature=1.0):
    p, q = (teacher_V / temperature).softmax(0), (student_V / temperature).softmax(0)
    return sum(p[v] * (p[v].log() - q[v].log()) for v in range(len(p)))


def same_gradients(loss, expected, parameters):
    found = torch.autograd.grad(loss, parameters, retain_graph=True)
    assert_close(found, torch.autograd.grad(expected, parameters), atol=1e-9, rtol=1e-7)


# Compositions by hand


def test_kl_and_cross_entropy_of_packed_documents_by_hand():
    student, teacher, batch = model_of(0), model_of(1), packed()
    lesson = DistilLesson(
        student, LiveTeacher(teacher),
        [Term("forward_kl", lambda progress: 0.9, temperature=2.0), Term("cross_entropy", lambda progress: 0.3),
         Term("reverse_kl", lambda progress: 0.2)],
    )  # fmt: skip
    loss, found = lesson(batch)
    own, _ = by_place(student, batch)
    with torch.no_grad():
        theirs, _ = by_place(teacher, batch)
    soft = sum(kl_by_hand(theirs[b, t - 1], own[b, t - 1], 2.0) for b, t in scored(batch))
    text = sum(-own[b, t - 1].log_softmax(0)[batch.input_ids_BT[b, t]] for b, t in scored(batch))
    reverse = sum(kl_by_hand(own[b, t - 1], theirs[b, t - 1]) for b, t in scored(batch))
    expected = 0.9 * 4 * soft + 0.3 * text + 0.2 * reverse
    assert lesson.count(batch) == len(scored(batch)) == 17
    assert_close(loss, expected)
    assert_close(found, {"forward_kl": soft.detach(), "cross_entropy": text.detach(), "reverse_kl": reverse.detach()})
    same_gradients(loss, expected, list(student.parameters()))


def test_projected_hidden_states_by_hand():
    student, teacher, batch = model_of(0, width=NARROW), model_of(1), packed()
    projections = FeatureProjections([(1, 1)], student_width=NARROW, teacher_width=WIDTH).double()
    terms = [Term("cross_entropy"), Term("hidden_mse", lambda progress: 0.7, pairs=((1, 1),))]
    lesson = DistilLesson(student, LiveTeacher(teacher), terms, projections=projections)
    loss, found = lesson(batch)
    own, mine = by_place(student, batch)
    with torch.no_grad():
        _, theirs = by_place(teacher, batch)
    (weight_ED,) = projections.parameters()
    text = sum(-own[b, t - 1].log_softmax(0)[batch.input_ids_BT[b, t]] for b, t in scored(batch))
    error = sum((weight_ED @ mine[b, t - 1] - theirs[b, t - 1]).square().sum() / WIDTH for b, t in scored(batch))
    assert_close(loss, text + 0.7 * error)
    assert_close(found["hidden_mse"], error.detach())
    same_gradients(loss, text + 0.7 * error, [*student.parameters(), weight_ED])
    assert [name for name, _ in lesson.named_parameters() if name.startswith("projections.")] == [
        name for name, _ in lesson.helpers()
    ]


def test_the_mean_of_several_pairs_of_layers():
    student, teacher, batch = model_of(0), model_of(1), packed()

    def loss(*pairs):
        return DistilLesson(student, LiveTeacher(teacher), [Term("hidden_mse", pairs=pairs)])(batch)[0]

    assert_close(loss((1, 1), (2, 1)), (loss((1, 1)) + loss((2, 1))) / 2)


def test_weights_by_row_count_in_the_teachers_terms_alone():
    student, one, other, batch = model_of(0), model_of(1), model_of(2), packed()
    weights = torch.tensor([[0.25, 0.25], [0.0, 1.0]])
    source = SeveralTeachers([LiveTeacher(one), LiveTeacher(other)], weights=lambda batch: weights)
    loss, found = DistilLesson(student, source, [Term("forward_kl"), Term("cross_entropy")])(batch)
    own, _ = by_place(student, batch)
    with torch.no_grad():
        (first, _), (second, _) = by_place(one, batch), by_place(other, batch)
    text = sum(-own[b, t - 1].log_softmax(0)[batch.input_ids_BT[b, t]] for b, t in scored(batch))
    taught = 0.0
    for b, t in scored(batch):
        share = weights[b] / weights[b].sum()
        mixed = share[0] * first[b, t - 1].softmax(0) + share[1] * second[b, t - 1].softmax(0)
        taught = taught + weights[b].sum() * kl_by_hand(mixed.log(), own[b, t - 1])
    assert_close(loss, taught + text)
    assert_close(found["cross_entropy"], text.detach())
    same_gradients(loss, taught + text, list(student.parameters()))


class Given:
    """A teacher that says what it was given."""

    name, vocabulary_size = "given", VOCABULARY

    def __init__(self, targets):
        self.given, self.wanted = targets, None

    def prepare(self, wanted):
        self.wanted = wanted

    def targets(self, batch):
        return self.given


def test_where_the_teacher_does_not_know_only_the_text_counts():
    student, batch = model_of(0), packed()
    theirs = torch.randn(2, 12, VOCABULARY, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    known = torch.rand(2, 12, generator=torch.Generator().manual_seed(2)) < 0.5
    source = Given(Targets(DenseTargets.from_logits(theirs), known_BT=known))
    loss, found = DistilLesson(student, source, [Term("forward_kl"), Term("cross_entropy")])(batch)
    own, _ = by_place(student, batch)
    text = sum(-own[b, t - 1].log_softmax(0)[batch.input_ids_BT[b, t]] for b, t in scored(batch))
    taught = sum(kl_by_hand(theirs[b, t - 1], own[b, t - 1]) for b, t in scored(batch) if known[b, t - 1])
    assert 0 < sum(bool(known[b, t - 1]) for b, t in scored(batch)) < 17
    assert_close(loss, taught + text)
    assert_close(found, {"forward_kl": taught.detach(), "cross_entropy": text.detach()})
    same_gradients(loss, taught + text, list(student.parameters()))


# Across tokenizers


def aligned():
    """Two chunks in the first row (tokens 1-2 and 4-6), one in the second (5); borders after tokens 2, 6 and 5."""
    chunk = torch.full((2, 12), -1)
    chunk[0, 1:3], chunk[0, 4:7], chunk[1, 5] = 0, 1, 0
    return AlignedText(
        chunk, torch.tensor([[-3.0, -9.0], [-2.0, 0.0]]), torch.tensor([[True, True], [True, False]]),
        torch.tensor([[2, 6], [5, -1]]),
        torch.tensor([[[0.5, 0.25, 0.125], [0.9, 0.1, 0.0]], [[0.4, 0.3, 0.3], [0.0, 0.0, 0.0]]]),
    )  # fmt: skip


def plain():
    batch = Batch(token_ids(2, 12), torch.ones(2, 12, dtype=torch.bool))
    batch.loss_mask_BT[:, 0] = False
    return batch


def test_chunk_likelihood_by_hand():
    student, batch, said = model_of(0), plain(), aligned()
    terms = [Term("cross_entropy", lambda progress: 0.5), Term("chunk_likelihood", options={"coin_temperature": 5.0})]
    lesson = DistilLesson(student, source := Given(Targets(aligned=said)), terms, crosses_tokenizers=True)
    assert source.wanted.parts() == ("aligned",)
    loss, found = lesson(batch)
    logp = student(batch.input_ids_BT).logits.log_softmax(-1)
    text = sum(-logp[b, t - 1, batch.input_ids_BT[b, t]] for b in range(2) for t in range(1, 12))
    matched = 0.0
    for row, number, tokens in ((0, 0, (1, 2)), (0, 1, (4, 5, 6)), (1, 0, (5,))):
        nats = sum(-logp[row, t - 1, batch.input_ids_BT[row, t]] for t in tokens) + 1e-6
        p, q = math.exp((said.chunk_log_prob_BC[row, number] - 1e-6) / 5), (-nats / 5).exp()
        matched = matched + 5 * (p * (math.log(p) - q.log()) + (1 - p) * (math.log(1 - p) - (1 - q).log()))
    # Chunks are summed in float32.
    assert_close(found["chunk_likelihood"], matched.detach(), atol=1e-5, rtol=1e-5, check_dtype=False)
    assert_close(loss, matched + 0.5 * text, atol=1e-4, rtol=1e-6)
    wanted = torch.autograd.grad(matched + 0.5 * text, list(student.parameters()))
    got = torch.autograd.grad(loss, list(student.parameters()))
    assert_close(got, wanted, atol=1e-4, rtol=1e-4)


def test_sorted_probabilities_at_common_borders_by_hand():
    student, batch, said = model_of(0), plain(), aligned()
    lesson = DistilLesson(student, Given(Targets(aligned=said)), [Term("sorted_earth_mover")], crosses_tokenizers=True)
    loss, _ = lesson(batch)
    probs = student(batch.input_ids_BT).logits.softmax(-1)
    expected = 0.0
    for row, place, position in ((0, 0, 2), (0, 1, 6), (1, 0, 5)):
        mine, theirs = probs[row, position].sort(descending=True).values[:3], said.sorted_probs_BPK[row, place].double()
        expected = expected + (mine - theirs).abs().sum() + ((1 - mine.sum()) - (1 - theirs.sum())).abs()
    assert_close(loss, expected, atol=1e-6, rtol=1e-6)
    wanted = torch.autograd.grad(expected, list(student.parameters()))
    assert_close(torch.autograd.grad(loss, list(student.parameters())), wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("objective", ["chunk_likelihood", "sorted_earth_mover"])
def test_rows_without_anything_in_common_teach_nothing(objective):
    nothing = AlignedText(
        torch.full((2, 12), -1), torch.zeros(2, 0), torch.zeros(2, 0, dtype=torch.bool),
        torch.zeros(2, 0, dtype=torch.int64), torch.zeros(2, 0, 3),
    )  # fmt: skip
    student = model_of(0)
    loss, _ = DistilLesson(student, Given(Targets(aligned=nothing)), [Term(objective)], crosses_tokenizers=True)(
        plain()
    )
    assert float(loss) == 0
    loss.backward()
    # Every parameter is reached, so that processes which share their gradients do not wait for one another.
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in student.parameters())


# Modes, formats and checkpointing


def test_teachers_stay_in_evaluation_mode_while_the_student_drops_out():
    batch = packed()
    for make in (LiveTeacher, lambda model: EmaTeacher(model, decay=0.9)):
        source = make(model_of(1, dropout=0.5).train())
        student = model_of(0, dropout=0.5).train()
        said = []
        ask = source.targets
        source.targets = lambda batch, ask=ask, said=said: said.append(ask(batch)) or said[-1]
        lesson = DistilLesson(student, source, [Term("forward_kl"), Term("hidden_mse", pairs=((1, 1),))])
        lesson.train()
        values = [float(lesson(batch)[0].detach()) for _ in range(2)]
        assert values[0] != values[1]
        assert torch.equal(said[0].logits.hidden_BTD, said[1].logits.hidden_BTD)
        assert torch.equal(said[0].hidden[1], said[1].hidden[1])
        lesson.diagnose(batch)
        assert student.training
        assert not source.model.training


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
def test_gradient_checkpointing_changes_nothing(family):
    batch, teacher = packed(), tiny_teacher(family)
    terms = [Term("forward_kl"), Term("hidden_mse", pairs=((1, 1), (2, 2)))]
    found = []
    for is_on in (False, True):
        student = copy.deepcopy(tiny_teacher(family)).train()
        with torch.no_grad():
            for parameter in student.parameters():
                parameter.mul_(1.1)
        if is_on:
            student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        lesson = DistilLesson(student, LiveTeacher(teacher), terms)
        lesson(batch)[0].backward()
        found.append([parameter.grad for parameter in student.parameters()])
        assert set(lesson.diagnose(batch)) >= {"share.forward_kl", "share.hidden_mse"}
    assert_close(found[0], found[1], atol=0, rtol=0)


def test_adapters_learn_from_a_teacher_in_another_number_format():
    from peft import LoraConfig, get_peft_model

    adapter = LoraConfig(target_modules=["query_key_value"], r=2, init_lora_weights=False, lora_dropout=0.5)
    student = get_peft_model(model_of(0, dtype=torch.float32), adapter).train()
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    teacher = LiveTeacher(model_of(1, dtype=torch.bfloat16))
    lesson = DistilLesson(student, teacher, [Term("forward_kl"), Term("hidden_mse", pairs=((1, 1),))])
    lesson(packed())[0].backward()
    trained = {name for name, parameter in student.named_parameters() if parameter.requires_grad}
    reached = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert trained == reached
    assert all("lora" in name for name in trained)
    shares = lesson.diagnose(packed())
    assert math.isclose(shares["share.forward_kl"] + shares["share.hidden_mse"], 1.0, rel_tol=1e-6)


# Through the loop


SETTINGS = StageSettings(
    name="distil", tokens=640, batch_tokens=64, learning_rate=0.01, checkpoint_every_tokens=192, micro_batch_sequences=3
)  # fmt: skip


def lesson_of(kind, *, dropout=0.2, dtype=torch.float32):
    student = model_of(0, width=NARROW, dropout=dropout, dtype=dtype)
    teacher = LiveTeacher(model_of(1, dtype=dtype))
    kl, hidden = Term("forward_kl", Ramp(start=1.0, end=0.5).at), Term("hidden_mse", pairs=((1, 1),))
    if kind == "average":
        return DistilLesson(student, EmaTeacher(student, decay=0.5), [kl, Term("cross_entropy")])
    projections = FeatureProjections([(1, 1)], student_width=NARROW, teacher_width=WIDTH).to(dtype)
    terms = [hidden] if kind == "features" else [kl, hidden]
    return DistilLesson(student, teacher, terms, projections=projections)


def trained(folder, lesson, *, stop=None, is_main=True, **changes):
    tokens = (np.arange(4000) * 7 % 93 + 3).astype(np.int32)
    data = Mixture([TokenWindows(tokens, np.array([0, 5, 70, 900]), context_tokens=8)], weights=[1.0], seed=3)
    folder.mkdir(exist_ok=True, parents=True)
    train_stage(
        lesson, data, replace(SETTINGS, **changes), folder=folder / "checkpoints",
        log=MetricsLog(folder / "metrics.jsonl" if is_main else None), arm="student", seed=1, device=torch.device("cpu"), stop=stop,
    )  # fmt: skip
    return {name: p.detach().clone() for name, p in lesson.student.named_parameters()} | lesson.state_tensors()


def assert_same(one, other):
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


class StopAt(StopRequest):
    """Asks to stop after so many updates."""

    def __init__(self, after):
        self.left = after

    @property
    def exit_code(self):
        self.left -= 1
        return 143 if self.left < 0 else None


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["projections", "average"])
def test_stopped_and_continued_is_bit_identical(tmp_path, kind, optimizer):
    words = {"optimizer": optimizer, "ema_decay": 0.9, "diagnoses": 3}
    whole = trained(tmp_path / "whole", lesson_of(kind), **words)
    for after in (1, 7):
        with pytest.raises(SystemExit):
            trained(tmp_path / str(after), lesson_of(kind), stop=StopAt(after), **words)
        assert_same(trained(tmp_path / str(after), lesson_of(kind), **words), whole)


@pytest.mark.parametrize("kind", ["projections", "average"])
def test_looking_at_the_terms_does_not_disturb_training(tmp_path, kind):
    quiet = trained(tmp_path / "0", lesson_of(kind), diagnoses=0)
    assert_same(trained(tmp_path / "10", lesson_of(kind), diagnoses=10), quiet)


def test_micro_batches_add_up(tmp_path):
    words = {"dropout": 0.0, "dtype": torch.float64}
    whole = trained(tmp_path / "whole", lesson_of("projections", **words), micro_batch_sequences=None)
    assert_close(trained(tmp_path / "parts", lesson_of("projections", **words)), whole, atol=1e-8, rtol=1e-8)


def test_weights_go_from_the_first_update_to_the_last(tmp_path):
    lesson, seen = lesson_of("projections"), []
    lesson.terms = tuple(
        replace(term, weight=lambda progress, term=term: seen.append((term.objective, progress)) or 1.0)
        for term in lesson.terms
    )
    trained(tmp_path, lesson, tokens=320, micro_batch_sequences=None)
    assert [progress for name, progress in seen if name == "forward_kl"] == [0, 0.25, 0.5, 0.75, 1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["projections", "average", "features"])
def test_two_processes_equal_one(tmp_path, kind):
    import os
    import subprocess
    import sys

    start = [sys.executable, "-m"]
    several = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m"]
    for number, extra in ((1, []), (2, several)):
        subprocess.run(
            [*start, *extra, "tests.train.test_distil", kind, str(tmp_path / str(number))], check=True, timeout=120,
            env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL,
        )  # fmt: skip
    one, two = (torch.load(tmp_path / str(number) / "weights.pt", weights_only=True) for number in (1, 2))
    assert_close(two, one, atol=1e-8, rtol=1e-8)


def train_alone_or_together(kind, folder):
    """What each process of `test_two_processes_equal_one` does."""
    from limbeck.core.runtime import is_main, start_distributed, stop_distributed

    start_distributed(torch.device("cpu"))
    lesson = lesson_of(kind, dropout=0.0, dtype=torch.float64)
    found = trained(folder, lesson, is_main=is_main(), micro_batch_sequences=2, tokens=320, diagnoses=2)
    if is_main():
        torch.save(found, folder / "weights.pt")
    stop_distributed()


if __name__ == "__main__":
    import sys
    from pathlib import Path

    train_alone_or_together(sys.argv[1], Path(sys.argv[2]))
