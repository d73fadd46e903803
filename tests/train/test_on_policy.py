"""Learning on what the student writes: the right rows, the right counts, the right gradient, and the same after a stop."""

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from tests.models.families import VOCABULARY, tiny_teacher, token_ids
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.core.errors import CheckpointError, RecipeError
from limbeck.core.runtime import StopRequest
from limbeck.core.types import Batch
from limbeck.data.order import Mixture
from limbeck.data.windows import TokenWindows
from limbeck.models.hybrid import build_student
from limbeck.teachers.entries import TopK
from limbeck.teachers.live import LiveTeacher
from limbeck.train import rollouts
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.metrics import MetricsLog
from limbeck.train.on_policy import AdaptiveLesson, MiniLLMLesson, OnPolicyLesson
from limbeck.train.rollouts import ReuseBuffer, RowWriter, Writing, prompt_of, select_rows, written_rows
from limbeck.train.stages import set_dropout
from limbeck.train.trainer import StageSettings, train_stage

END = 2
TEXT, KL = Term("cross_entropy", lambda progress: 0.5), Term("jensen_shannon")
REVERSE = Term("reverse_kl")


def student_of(family="llama", mixers=("hyena", "attention")):
    teacher = tiny_teacher(family)  # its first call seeds torch
    torch.manual_seed(3)
    return build_student(teacher, mixers=list(mixers), hyena={})


def text(rows=4, width=12, seed=0):
    ids = token_ids(rows, width, seed=seed)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    return Batch(ids, mask)


def packed():
    """Two rows: documents of 3 + 9 tokens, and of 6 + 4 + 2."""
    batch = text(2)
    documents = torch.tensor([[0] * 3 + [1] * 9, [0] * 6 + [1] * 4 + [2] * 2])
    positions = torch.tensor([[*range(3), *range(9)], [*range(6), *range(4), *range(2)]])
    mask = batch.loss_mask_BT & (positions > 0)
    return Batch(batch.input_ids_BT, mask, documents, positions)


def writer_of(student, teacher=None, share=0.0, **words):
    return RowWriter(
        student, Writing(**({"prompt_tokens": 4} | words)), vocabulary_size=VOCABULARY, teacher=teacher, teacher_share=share
    )  # fmt: skip


# Prompts


def test_the_prompt_is_the_beginning_of_the_longest_document():
    ids, scored = torch.arange(10), torch.ones(10, dtype=torch.bool)
    documents = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 2, 2])
    assert prompt_of(ids, scored, documents, prompt_tokens=2).tolist() == [3, 4]
    assert prompt_of(ids, scored, None, prompt_tokens=3).tolist() == [0, 1, 2]
    # One token of it is always left to write.
    assert prompt_of(ids, scored, documents, prompt_tokens=99).tolist() == [3, 4, 5, 6]
    assert prompt_of(ids, scored, torch.arange(10), prompt_tokens=99).tolist() == [0]
    # A question is not cut, and padding is not a document.
    question = torch.arange(10) >= 6
    assert prompt_of(ids, question, None, prompt_tokens=2).tolist() == [0, 1, 2, 3, 4, 5]
    answer_ends = torch.arange(10) < 4
    assert prompt_of(ids, answer_ends, torch.tensor([0] * 4 + [1] * 6), prompt_tokens=9).tolist() == [0, 1, 2]


# Writing


def test_written_rows_are_prompt_writing_and_padding():
    batch = packed()
    chosen, writer = torch.tensor([True, False]), writer_of(student_of(), max_new_tokens=5)
    torch.manual_seed(0)
    new = writer.write(batch, chosen)
    assert new.input_ids_BT[0, :4].tolist() == batch.input_ids_BT[0, 3:7].tolist()
    assert new.loss_mask_BT[0].tolist() == [False] * 4 + [True] * 5 + [False] * 3
    assert new.document_ids_BT[0].tolist() == [0] * 12
    assert new.position_ids_BT[0].tolist() == list(range(12))
    assert written_rows(new).tolist() == [True, False]
    for old, now in zip(vars(batch).values(), vars(new).values(), strict=True):
        if isinstance(old, torch.Tensor):
            assert torch.equal(old[1], now[1])
    torch.manual_seed(0)
    again = writer.write(batch, chosen)
    assert torch.equal(again.input_ids_BT, new.input_ids_BT)


def test_without_a_limit_the_window_is_filled_and_nothing_chosen_changes_nothing():
    batch = text(3)
    writer = writer_of(student_of(), rows_at_a_time=2)
    new = writer.write(batch, torch.ones(3, dtype=torch.bool))
    assert new.loss_mask_BT.sum(1).tolist() == [8, 8, 8]
    assert writer.write(batch, torch.zeros(3, dtype=torch.bool)) is batch


def test_a_long_question_leaves_the_others_their_room():
    batch = text(3)
    batch.loss_mask_BT[1, :10] = False
    new = writer_of(student_of()).write(batch, torch.ones(3, dtype=torch.bool))
    assert new.loss_mask_BT.sum(1).tolist() == [8, 2, 8]
    assert new.input_ids_BT[1, :10].tolist() == batch.input_ids_BT[1, :10].tolist()
    new = writer_of(student_of(), prompt_tokens=50).write(batch, torch.ones(3, dtype=torch.bool))
    assert new.loss_mask_BT.sum(1).tolist() == [1, 1, 1]


def test_writing_stops_at_the_end_token():
    student, batch = student_of(), text(64)
    torch.manual_seed(1)
    new = writer_of(student, end_token=END, temperature=3.0).write(batch, torch.ones(64, dtype=torch.bool))
    ended = 0
    for ids, mask in zip(new.input_ids_BT.tolist(), new.loss_mask_BT.tolist(), strict=True):
        written = [token for token, scored in zip(ids, mask, strict=True) if scored]
        assert mask == [False] * 4 + [True] * len(written) + [False] * (8 - len(written))
        assert END not in written[:-1]
        assert len(written) == 8 or written[-1] == END
        ended += len(written) < 8
    assert ended > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_cached_and_padded_writing_follows_both_models_exactly(family, monkeypatch):
    """The distributions of every step against a pass over the finished rows, each alone and without padding."""
    seen = []

    def watch(own, theirs, **options):
        seen.append((own, theirs))
        return sampling(own, theirs, **options)

    sampling = rollouts.sampling_log_probs
    monkeypatch.setattr(rollouts, "sampling_log_probs", watch)
    student, teacher, batch = student_of(family), tiny_teacher(family), packed()
    writer = writer_of(student, teacher, 0.3, prompt_tokens=7)
    new = writer.write(batch, torch.ones(2, dtype=torch.bool))
    begins = [int(mask.int().argmax()) for mask in new.loss_mask_BT]
    assert begins == [7, 5]
    for row, begin in enumerate(begins):
        for model, which in ((student, 0), (teacher, 1)):
            with torch.no_grad():
                whole = model.eval()(new.input_ids_BT[row : row + 1], use_cache=False).logits[0]
            for step, logits in enumerate(seen):
                assert_close(logits[which][row], whole[begin - 1 + step], atol=2e-4, rtol=1e-3)


def test_tokens_come_as_often_as_the_mixture_says():
    student, teacher = (model_of(seed, dtype=torch.float32) for seed in (1, 2))
    batch = Batch(torch.ones(6000, 3, dtype=torch.long), torch.tensor([[False, True, True]]).expand(6000, 3))
    with torch.no_grad():
        own, theirs = (
            torch.softmax(model(batch.input_ids_BT[:1, :1]).logits[0, 0] / 1.3, -1) for model in (student, teacher)
        )
    writing = Writing(prompt_tokens=1, max_new_tokens=1, temperature=1.3)
    writer = RowWriter(student, writing, vocabulary_size=4, teacher=teacher, teacher_share=0.4)
    torch.manual_seed(0)
    new = writer.write(batch, torch.ones(6000, dtype=torch.bool))
    found = torch.bincount(new.input_ids_BT[:, 1], minlength=4) / 6000
    assert_close(found, 0.6 * own + 0.4 * theirs, atol=0.02, rtol=0)
    assert (own - theirs).abs().max() > 0.1


def test_the_models_own_generation_settings_and_mode_are_put_aside_and_back():
    student, batch = student_of(), text(3)
    set_dropout(student, 0.5)
    torch.manual_seed(4)
    plain = writer_of(student).write(batch, torch.ones(3, dtype=torch.bool))
    habits = student.generation_config
    habits.update(repetition_penalty=50.0, top_k=1, do_sample=True, suppress_tokens=[5, 6, 7], max_length=3)
    student.train()
    torch.manual_seed(4)
    again = writer_of(student).write(batch, torch.ones(3, dtype=torch.bool))
    assert torch.equal(plain.input_ids_BT, again.input_ids_BT)
    assert student.generation_config is habits
    assert student.training
    assert all(p.grad is None for p in student.parameters())


def test_any_token_can_be_written_unless_the_nucleus_leaves_it_out():
    """At a high temperature 96 tokens are nearly even; generate()'s own default would keep 50 of them."""
    student, everyone = student_of(), torch.ones(400, dtype=torch.bool)

    def written(**words):
        new = writer_of(student, temperature=500.0, max_new_tokens=8, **words).write(text(400), everyone)
        return set(new.input_ids_BT[new.loss_mask_BT].tolist())

    assert written() == set(range(VOCABULARY))
    batch = Batch(torch.full((400, 6), 7), torch.ones(400, 6, dtype=torch.bool))
    new = writer_of(student, temperature=500.0, max_new_tokens=1, top_p=0.3).write(batch, everyone)
    assert 20 < len(set(new.input_ids_BT[new.loss_mask_BT].tolist())) < 35


def test_rows_of_the_embedding_that_are_no_tokens_are_never_written():
    writer = RowWriter(student_of(), Writing(4, temperature=5.0), vocabulary_size=9)
    new = writer.write(text(20), torch.ones(20, dtype=torch.bool))
    assert new.input_ids_BT[new.loss_mask_BT].max() < 9


def test_keys_keep_their_beginning_and_rows_their_source():
    batch = text(2)
    batch = Batch(batch.input_ids_BT, batch.loss_mask_BT, keys=("code/1", "law/2"), sources=(0, 1))
    new = writer_of(student_of()).write(batch, torch.tensor([False, True]))
    assert new.sources == (0, 1)
    assert select_rows(new, written_rows(new)).sources == (1,)
    assert new.keys[0] == "code/1"
    assert new.keys[1].startswith("law/2")
    assert select_rows(new, written_rows(new)).keys == new.keys[1:]


# Mixed: GKD


def mixed(student=None, share=0.5, terms=(TEXT, KL), **words):
    source = LiveTeacher(tiny_teacher("llama"))
    writing = Writing(**({"prompt_tokens": 4, "end_token": END} | words))
    return OnPolicyLesson(student or student_of(), source, list(terms), writing=writing, share=share)


def test_the_share_of_rows_is_written():
    torch.manual_seed(0)
    lesson = mixed(share=0.25, max_new_tokens=1)
    written = sum(int(written_rows(lesson.prepare(text(40))).sum()) for _ in range(10))
    assert 70 < written < 130
    assert int(written_rows(mixed(share=1.0).prepare(text(5))).sum()) == 5


def test_without_written_rows_it_is_ordinary_distillation():
    lesson = mixed(share=0.0)
    batch = lesson.prepare(text())
    plain = DistilLesson(lesson.student, LiveTeacher(tiny_teacher("llama")), [TEXT, KL])
    (found, terms), (wanted, wanted_terms) = lesson(batch), plain(batch)
    assert_close(found, wanted)
    assert terms.keys() == wanted_terms.keys()


def test_text_is_imitated_and_writing_is_not():
    lesson = mixed()
    batch = lesson.writer.write(text(), torch.tensor([True, False, True, False]))
    lesson._counted(batch)
    loss, terms = lesson(batch)
    only_text = select_rows(batch, ~written_rows(batch))
    plain = DistilLesson(lesson.student, LiveTeacher(tiny_teacher("llama")), [KL])
    ordinary = DistilLesson(lesson.student, None, [TEXT])
    # Each term is a mean over its own tokens when the sum is divided by all of them.
    cross_entropy = ordinary(only_text)[0] * batch.target_count / only_text.target_count
    assert_close(loss, plain(batch)[0] + cross_entropy)
    assert_close(terms["cross_entropy"], cross_entropy.detach() / 0.5)
    assert_close(terms["jensen_shannon"], plain(batch)[1]["jensen_shannon"])


def gradients(lesson, parts):
    lesson.zero_grad()
    for part in parts:
        lesson(part)[0].backward()
    return [p.grad.clone() for p in lesson.student.parameters()]


@pytest.mark.parametrize("make", [lambda: mixed(), lambda: minillm(terms=[REVERSE, TEXT])], ids=["mixed", "minillm"])
def test_micro_batches_add_up(make):
    lesson = make()
    torch.manual_seed(2)
    batch = lesson.prepare(text())
    rows = range(len(batch.input_ids_BT))
    parts = [select_rows(batch, torch.tensor([row == one for row in rows])) for one in rows]
    for one, other in zip(gradients(lesson, [batch]), gradients(lesson, parts), strict=True):
        assert_close(one, other, atol=1e-4, rtol=1e-3)


def test_diagnosis_keeps_to_the_same_rule():
    lesson = mixed(share=1.0)
    found = lesson.diagnose(lesson.prepare(text()))
    assert found["gradient.cross_entropy"] == 0
    assert found["share.jensen_shannon"] == 1
    found = minillm(terms=[REVERSE, TEXT])
    found = found.diagnose(found.prepare(text()))
    assert found["share.reverse_kl"] + found["share.cross_entropy"] == pytest.approx(1)
    assert found["entropy.student"] > 0


def test_a_student_without_a_teacher_is_refused():
    for source, terms in ((None, [TEXT]), (LiveTeacher(tiny_teacher("llama")), [TEXT])):
        with pytest.raises(RecipeError, match="learns nothing from its own writing"):
            OnPolicyLesson(student_of(), source, terms, writing=Writing(4), share=0.5)


# Adaptive: DistiLLM


def adaptive(student=None, **words):
    options = {"heldout": text(2, seed=9), "buffer_rows": 6, "first_share": 0.5} | words
    writing = Writing(4, max_new_tokens=3, end_token=END)
    return AdaptiveLesson(
        student or student_of(), LiveTeacher(tiny_teacher("llama")), [KL, TEXT], writing=writing, **options
    )


def test_the_share_grows_when_the_held_out_loss_rises():
    lesson = adaptive(first_share=0.0, growth=0.4, tolerance_nats=0.1)
    shares = []
    for loss in (3.0, 2.0, 2.05, 2.11, 2.2, 2.25, 1.0, 1.2, 1.4):
        lesson.notice(loss)
        shares.append(lesson.share)
    assert shares == pytest.approx([0, 0, 0, 0.4, 0.4, 0.8, 0.8, 1.0, 1.0])


def test_the_held_out_loss_is_looked_at_now_and_then_and_is_the_texts():
    lesson = adaptive(checks=5)
    looked = []
    lesson.notice = looked.append
    set_dropout(lesson.student, 0.5)
    lesson.student.train()
    for step in range(50):
        lesson.begin_update(step, 50)
    assert len(looked) == 5
    assert lesson.student.training
    lesson.student.eval()
    with torch.no_grad():
        logits = lesson.student(lesson.heldout.input_ids_BT).logits
    wanted = torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1), lesson.heldout.input_ids_BT[:, 1:].flatten()
    )
    assert looked[0] == pytest.approx(float(wanted), rel=1e-5)


def test_old_rows_come_back_once_the_buffer_is_full():
    lesson = adaptive(first_share=1.0)
    lesson.begin_update(1, 3)
    first, second = lesson.prepare(text()), lesson.prepare(text(seed=1))
    assert lesson.buffer.is_full
    known = {tuple(row) for row in torch.cat([first.input_ids_BT, second.input_ids_BT]).tolist()}
    fresh = old = 0
    for turn in range(12):
        before = lesson.buffer.added
        batch = lesson.prepare(text(seed=20 + turn))
        assert written_rows(batch).all()
        new = lesson.buffer.added - before
        again = sum(tuple(row) in known for row in batch.input_ids_BT.tolist())
        assert again == 4 - new
        fresh, old = fresh + new, old + again
        known |= {tuple(row) for row in batch.input_ids_BT.tolist()}
    assert 10 < fresh < 38  # half of 48
    lesson.begin_update(2, 3)
    before = lesson.buffer.added
    lesson.prepare(text(seed=50))
    assert lesson.buffer.added == before  # none is written anew at the end


def test_the_buffer_keeps_the_last_rows():
    buffer = ReuseBuffer(3)
    for number in range(5):
        ids = torch.full((2, 4), number)
        ids[1] = 99
        buffer.add(ids, ids > 2, torch.tensor([True, False]))
        assert len(buffer) == min(number + 1, 3)
    ids, scored = buffer.draw(200)
    assert set(ids[:, 0].tolist()) == {2, 3, 4}
    assert torch.equal(scored, ids > 2)
    other = ReuseBuffer(3)
    other.load_state_tensors({name: value.clone() for name, value in buffer.state_tensors().items()})
    for one in (buffer, other):
        one.add(torch.full((1, 4), 7), torch.ones(1, 4, dtype=torch.bool), torch.tensor([True]))
    for one, same in zip(buffer.state_tensors().values(), other.state_tensors().values(), strict=True):
        assert torch.equal(one, same)
    with pytest.raises(CheckpointError, match="holds 3 of 6 rows"):
        ReuseBuffer(5).load_state_tensors(buffer.state_tensors())


# MiniLLM


def minillm(student=None, *, terms=(REVERSE,), teacher_share=0.2, source=None, **words):
    writing = Writing(4, max_new_tokens=5, end_token=END)
    source = source or LiveTeacher(tiny_teacher("llama"))
    return MiniLLMLesson(
        student or student_of(), source, list(terms), **({"writing": writing, "teacher_share": teacher_share} | words)
    )


def model_of(seed, *, dtype=torch.float64):
    """A model of four tokens whose predictions are far from even; of a family that computes all in its own dtype."""
    config = AutoConfig.for_model(
        "gpt2", vocab_size=4, n_embd=8, n_layer=1, n_head=2, n_positions=16, bos_token_id=1, eos_token_id=2,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.7)
    return model


def every_row(prompt=(1, 3), longest=3, width=6):
    """Every row that can be written after a prompt, as the writer lays it out."""
    rows, masks = [], []
    for length in range(1, longest + 1):
        for ids in itertools.product(range(4), repeat=length):
            if END not in ids[:-1] and (ids[-1] == END or length == longest):
                pad = width - len(prompt) - length
                rows.append([*prompt, *ids, *[END] * pad])
                masks.append([False] * len(prompt) + [True] * length + [False] * pad)
    return Batch(torch.tensor(rows), torch.tensor(masks), keys=("~written",) * len(rows))


def token_log_probs(model, batch, temperature=1.0):
    """Of each row's tokens, 0 where they were not written."""
    logp = (model(batch.input_ids_BT).logits[:, :-1] / temperature).log_softmax(-1)
    picked = logp.gather(-1, batch.input_ids_BT[:, 1:, None]).squeeze(-1)
    return torch.where(batch.loss_mask_BT[:, 1:], picked, 0.0)


@pytest.mark.parametrize(
    ("share", "weights", "temperature"),
    [(0.0, "step", 1.0), (0.0, "prefix", 1.0), (0.3, "prefix", 1.0), (0.3, "prefix", 1.5)],
)
def test_the_lessons_gradient_is_that_of_the_reverse_kl_of_all_that_can_be_written(share, weights, temperature):
    student, teacher, rows = model_of(1), model_of(2), every_row()
    lesson = minillm(
        student, source=LiveTeacher(teacher), teacher_share=share, weights=weights, normalise_length=False,
        baseline_decay=0.9, writing=Writing(2, temperature=temperature),
    )  # fmt: skip
    lesson._baseline = -0.8
    own, theirs = token_log_probs(student, rows), token_log_probs(teacher, rows).detach()
    soft_own, soft_theirs = (token_log_probs(model, rows, temperature).detach().exp() for model in (student, teacher))
    chance = ((1 - share) * soft_own + share * soft_theirs).prod(1)
    assert_close(float(chance.sum()), 1.0)
    parameters = list(student.parameters())
    divergence = (own.sum(1).exp() * (own - theirs).sum(1)).sum()
    wanted = torch.autograd.grad(divergence, parameters)
    found = [torch.zeros_like(p) for p in parameters]
    value = 0.0
    for row, likelihood in enumerate(chance):
        loss, _ = lesson(select_rows(rows, torch.arange(len(chance)) == row))
        value += float(likelihood * loss)
        for total, part in zip(found, torch.autograd.grad(loss, parameters), strict=True):
            total += likelihood * part
    assert divergence > 0.5
    assert_close(value, float(divergence), rtol=1e-8, atol=1e-10)
    for one, other in zip(found, wanted, strict=True):
        assert_close(one, other, rtol=1e-7, atol=1e-9)


def test_text_follows_what_is_written_and_each_is_a_mean():
    lesson, batch = minillm(terms=[REVERSE, TEXT]), replace(text(), sources=(0, 1, 1, 0))
    prepared = lesson.prepare(batch)
    assert prepared.sources == (0, 1, 1, 0, 0, 1, 1, 0)
    assert written_rows(prepared).tolist() == [True] * 4 + [False] * 4
    assert torch.equal(prepared.input_ids_BT[4:], batch.input_ids_BT)
    loss, terms = lesson(prepared)
    count = lesson.count(prepared)
    written = select_rows(prepared, written_rows(prepared))
    cross_entropy = DistilLesson(lesson.student, None, [Term("cross_entropy")])(batch)[0] / batch.target_count
    assert_close(terms["cross_entropy"] / count, cross_entropy.detach())
    plain = (
        DistilLesson(lesson.student, LiveTeacher(tiny_teacher("llama")), [REVERSE])(written)[0] / written.target_count
    )
    assert_close(terms["reverse_kl"] / count, plain.detach())
    assert_close(loss / count, plain + 0.5 * cross_entropy)


def test_the_baseline_follows_the_mean_of_what_comes_after_tokens():
    lesson = minillm(baseline_decay=0.75)
    assert lesson.state_tensors() == {}
    seen = []
    for step in range(2):
        batch = lesson.prepare(text(seed=step))
        for row in range(4):
            lesson(select_rows(batch, torch.arange(4) == row))
        total, count = lesson._futures.tolist()
        assert count == batch.target_count
        seen.append(total / count)
        lesson.diagnose(batch)
        lesson.end_update(step + 1)
    kept = float(lesson.state_tensors()["baseline"])
    assert kept == pytest.approx(0.75 * seen[0] + 0.25 * seen[1])
    assert kept < 0
    other = minillm(baseline_decay=0.75)
    other.load_state_tensors(lesson.state_tensors())
    assert float(other.state_tensors()["baseline"]) == kept


def test_what_minillm_cannot_do_is_refused():
    with pytest.raises(RecipeError, match="got forward_kl"):
        minillm(terms=[Term("forward_kl")])
    with pytest.raises(RecipeError, match="neither temperature nor options"):
        minillm(terms=[Term("reverse_kl", temperature=2.0)])
    with pytest.raises(RecipeError, match=r"on_policy.top_p.*Set it to 1"):
        minillm(writing=Writing(4, top_p=0.9))
    lesson = minillm(source=LiveTeacher(tiny_teacher("llama"), entries=TopK(5)))
    with pytest.raises(RecipeError, match="whole distribution"):
        lesson(lesson.prepare(text()))

    class Elsewhere:
        name, vocabulary_size = "a mixture", VOCABULARY

    with pytest.raises(RecipeError, match="Set teacher_share to 0"):
        minillm(source=Elsewhere())


# In the loop

LESSONS = {
    "mixed": lambda student: mixed(student, max_new_tokens=3),
    "adaptive": lambda student: adaptive(student, tolerance_nats=-1.0, growth=0.05, checks=6, first_share=0.7),
    "minillm": lambda student: minillm(student, terms=[REVERSE, TEXT], baseline_decay=0.9),
}
SETTINGS = StageSettings(
    name="distil", tokens=12 * 48, batch_tokens=48, learning_rate=0.01, checkpoint_every_tokens=2 * 48, diagnoses=3
)


def windows():
    tokens = np.random.default_rng(0).integers(3, VOCABULARY, 1200).astype(np.int32)
    return Mixture([TokenWindows(tokens, np.arange(0, 1200, 17), context_tokens=12)], weights=[1.0], seed=3)


def trained(folder, name, *, stop=None, settings=SETTINGS):
    lesson = LESSONS[name](student_of())
    result = train_stage(
        lesson, windows(), settings, folder=folder / "ck", log=MetricsLog(folder / "metrics.jsonl"), arm="student",
        seed=1, device=torch.device("cpu"), stop=stop,
    )  # fmt: skip
    return lesson, result


class StopAt(StopRequest):
    def __init__(self, after):
        self.left = after

    @property
    def exit_code(self):
        self.left -= 1
        return 143 if self.left < 0 else None


@pytest.mark.parametrize("name", LESSONS)
def test_stopped_and_continued_is_bit_identical(tmp_path, name):
    whole, result = trained(tmp_path / "whole", name)
    for after in (3, 10):
        with pytest.raises(SystemExit):
            trained(tmp_path / str(after), name, stop=StopAt(after))
        continued, again = trained(tmp_path / str(after), name)
        assert again.curve == result.curve
        for one, other in zip(whole.student.parameters(), continued.student.parameters(), strict=True):
            assert torch.equal(one, other)
        one, other = whole.state_tensors(), continued.state_tensors()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)
    line = json.loads((tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()[-1])
    assert np.isfinite(line["loss"])
    if name == "adaptive":
        assert whole.share == pytest.approx(0.95)
        assert whole.buffer.is_full


@pytest.mark.slow
@pytest.mark.parametrize("weights", ["step", "prefix"])
def test_the_policy_gradient_lowers_the_reverse_kl(weights):
    student, teacher, rows = model_of(1), model_of(2), every_row()

    def divergence():
        with torch.no_grad():
            own, theirs = token_log_probs(student, rows), token_log_probs(teacher, rows)
            return float((own.sum(1).exp() * (own - theirs).sum(1)).sum())

    lesson = minillm(
        student, source=LiveTeacher(teacher), weights=weights, baseline_decay=0.9,
        writing=Writing(2, max_new_tokens=3, end_token=END),
    )  # fmt: skip
    batch = Batch(torch.tensor([[1, 3, 0, 0, 0, 0]] * 64), torch.tensor([[False] + [True] * 5] * 64))
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    before = divergence()
    for step in range(60):
        prepared = lesson.prepare(batch)
        optimizer.zero_grad()
        (lesson(prepared)[0] / lesson.count(prepared)).backward()
        optimizer.step()
        lesson.end_update(step + 1)
    assert divergence() < 0.2 * before


def _train_as(number, address, folder, queue):
    import os
    from pathlib import Path

    from limbeck.core.runtime import stop_distributed

    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2"}
    torch.distributed.init_process_group("gloo", init_method=address, rank=number, world_size=2)
    torch.set_num_threads(1)
    for name in ("adaptive", "minillm"):
        whole, _ = trained(Path(folder) / f"{name}-whole", name)
        with pytest.raises(SystemExit):
            trained(Path(folder) / f"{name}-parts", name, stop=StopAt(5 + number))
        continued, _ = trained(Path(folder) / f"{name}-parts", name)
        for part, lesson in (("whole", whole), ("parts", continued)):
            state = dict(lesson.student.named_parameters()) | lesson.state_tensors()
            queue.put(((name, part, number), {key: value.detach().tolist() for key, value in state.items()}))
    torch.distributed.barrier()
    stop_distributed()


@pytest.mark.slow
def test_two_processes_agree_and_resume(tmp_path):
    import torch.multiprocessing as mp

    context = mp.get_context("spawn")
    queue = context.Queue()
    arguments = [(number, f"file://{tmp_path / 'meeting'}", str(tmp_path), queue) for number in range(2)]
    workers = [context.Process(target=_train_as, args=one) for one in arguments]
    for worker in workers:
        worker.start()
    found = dict(queue.get(timeout=240) for _ in range(8))
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    for name in ("adaptive", "minillm"):
        whole = found[name, "whole", 0]
        for key in (("whole", 1), ("parts", 0), ("parts", 1)):
            other = found[name, *key]
            assert whole.keys() == other.keys()
            assert [part for part in whole if whole[part] != other[part]] == [], (name, key)
    # Six rows of both processes are kept, not three of each.
    assert len(found["adaptive", "whole", 0]["buffer.ids"]) == 6
