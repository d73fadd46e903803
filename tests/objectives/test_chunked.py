"""Chunked losses are the whole ones: value, every gradient, every kind of head; and no [N, V] tensor is left."""

import copy

import pytest
import torch
from tests.objectives import checks
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

from limbeck.core.errors import TrainingError, VocabularyError
from limbeck.core.types import DenseTargets, SparseTargets
from limbeck.objectives import chunked
from limbeck.objectives.chunked import logit_terms
from limbeck.objectives.combine import scored_ids, scored_rows, scored_targets
from limbeck.objectives.terms import LogitTerm, term_values

N, D, V = 13, 5, 11
TERMS = [
    LogitTerm("text", 0.3, "cross_entropy"),
    LogitTerm("kl", 0.7, "forward_kl", temperature=2.0),
    LogitTerm("js", 0.2, "jensen_shannon", options={"beta": 0.3}),
    LogitTerm("watched", 0.0, "reverse_kl"),
]


class SoftCap(nn.Module):
    """A head as Gemma's: logits bent by a tanh, with a bias for good measure."""

    def __init__(self, bias=True, dtype=torch.float64):
        super().__init__()
        self.linear = nn.Linear(D, V, bias=bias, dtype=dtype)

    def forward(self, hidden):
        return 3 * torch.tanh(self.linear(hidden) / 3)


def setting(seed=0):
    made = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, D, dtype=torch.float64, generator=made, requires_grad=True)
    ids = torch.randint(V, (N,), generator=made)
    teacher = DenseTargets(torch.randn(N, 4, dtype=torch.float64, generator=made), nn.Linear(4, V).double())
    return hidden, ids, teacher


def whole(hidden, head, ids, teacher, terms, row_weight=None, teacher_weight=None):
    """All at once, by plain autograd."""
    if isinstance(teacher, DenseTargets):
        teacher = teacher.head(teacher.hidden_BTD).detach()
    values = term_values(terms, head(hidden), target_ids_N=ids, teacher=teacher)
    total, sums = 0.0, {}
    for term, value in zip(terms, values, strict=True):
        value = value if row_weight is None else value * row_weight
        if teacher_weight is not None and term.objective != "cross_entropy":
            value = value * teacher_weight
        sums[term.name] = value.sum().detach()
        factor = 1 if term.objective == "cross_entropy" else term.temperature**2
        total = total + term.weight * factor * value.sum()
    return total, sums


def assert_same(found, right, inputs):
    assert_close(found[0], right[0], rtol=1e-10, atol=1e-10)
    assert_close(found[1], right[1], rtol=1e-10, atol=1e-10)
    scale = 0.37  # what a trainer divides by
    gradients = [torch.autograd.grad(total * scale, inputs) for total in (found[0], right[0])]
    assert_close(*gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("chunk_tokens", [1, 4, 13, 100, None])
@pytest.mark.parametrize("bias", [True, False])
def test_chunked_is_whole(chunk_tokens, bias, monkeypatch):
    monkeypatch.setattr(chunked, "BLOCK_BYTES", 3 * V * 8)
    hidden, ids, teacher = setting()
    head = SoftCap(bias)
    parameters = list(head.parameters())
    found = logit_terms(hidden, head, ids, teacher, TERMS, head_parameters=parameters, chunk_tokens=chunk_tokens)
    assert_same(found, whole(hidden, head, ids, teacher, TERMS), [hidden, *parameters])


@pytest.mark.parametrize("missing", ["tail", "uniform"])
def test_chunked_is_whole_with_sparse_targets(missing):
    hidden, ids, teacher = setting()
    head = nn.Linear(D, V, bias=False).double()
    kept = checks.keep_top(teacher.head(teacher.hidden_BTD).detach(), 4, unused=1)
    terms = [LogitTerm("kl", 1.0, "forward_kl", missing=missing), LogitTerm("order", 0.1, "hinge")]
    found = logit_terms(hidden, head, ids, kept, terms, head_parameters=[head.weight], chunk_tokens=5)
    assert_same(found, whole(hidden, head, ids, kept, terms), [hidden, head.weight])


def test_chunked_is_whole_with_sparse_targets_at_a_temperature():
    hidden, ids, teacher = setting()
    head = nn.Linear(D, V, bias=False).double()
    kept = checks.keep_top(teacher.head(teacher.hidden_BTD).detach(), 4)
    terms = [LogitTerm("kl", 1.0, "forward_kl", temperature=3.0), LogitTerm("order", 0.1, "hinge", temperature=3.0)]
    found = logit_terms(hidden, head, ids, kept, terms, head_parameters=[head.weight], chunk_tokens=5)
    values = term_values(terms, head(hidden), target_ids_N=ids, teacher=kept)
    right = 9 * values[0].sum() + 0.1 * values[1].sum()
    assert_same(found, (right, {"kl": values[0].sum().detach(), "order": values[1].sum().detach()}), [hidden])


def test_chunked_is_whole_with_sampled_targets():
    hidden, ids, _ = setting()
    head = nn.Linear(D, V, bias=False).double()
    drawn = SparseTargets(
        torch.randint(V, (N, 3)), -torch.rand(N, 3).double(), torch.full((N,), -torch.inf).double(),
        torch.rand(N, 3).double(),
    )  # fmt: skip
    terms = [LogitTerm("kl", 1.0, "forward_kl"), LogitTerm("text", 0.1, "cross_entropy")]
    found = logit_terms(hidden, head, ids, drawn, terms, head_parameters=[head.weight], chunk_tokens=5, diagnose=True)
    entropy = found[1].pop("entropy.student")
    assert_close(entropy, torch.distributions.Categorical(logits=head(hidden)).entropy().sum())
    assert_same(found, whole(hidden, head, ids, drawn, terms), [hidden, head.weight])


def test_weights_of_rows_and_of_the_teacher():
    hidden, ids, teacher = setting()
    head = SoftCap()
    row_weight, teacher_weight = torch.rand(N).double(), torch.rand(N).double()
    found = logit_terms(
        hidden, head, ids, teacher, TERMS, head_parameters=list(head.parameters()), chunk_tokens=4,
        row_weight_N=row_weight, teacher_weight_N=teacher_weight,
    )  # fmt: skip
    right = whole(hidden, head, ids, teacher, TERMS, row_weight, teacher_weight)
    assert_same(found, right, [hidden, *head.parameters()])


def test_tied_embeddings_get_both_gradients():
    """The head's weight is also where the hidden states came from."""
    embedding = nn.Embedding(V, D).double()
    ids = torch.randint(V, (N,))

    def head(hidden):
        return F.linear(hidden, embedding.weight)

    _, _, teacher = setting()
    gradients = []
    for way in (
        lambda hidden: logit_terms(
            hidden, head, ids, teacher, TERMS, head_parameters=[embedding.weight], chunk_tokens=4
        ),
        lambda hidden: whole(hidden, head, ids, teacher, TERMS),
    ):
        total, _ = way(torch.tanh(embedding(ids.flip(0))))
        gradients.append(torch.autograd.grad(total, embedding.weight)[0])
    assert_close(*gradients, rtol=1e-10, atol=1e-10)


def test_a_head_whose_parameters_share_one_gradient():
    """weight = base + change: autograd gives both the same tensor, which must not be added to twice."""
    base, change = (torch.randn(V, D, dtype=torch.float64, requires_grad=True) for _ in range(2))
    hidden, ids, teacher = setting()

    def head(hidden):
        return F.linear(hidden, base + change)

    found = logit_terms(hidden, head, ids, teacher, TERMS, head_parameters=[base, change], chunk_tokens=4)
    assert_same(found, whole(hidden, head, ids, teacher, TERMS), [hidden, base, change])


def test_logits_that_exist_already():
    """An identity head: hidden states are the logits."""
    logits, teacher_logits = checks.random_logits(N, V).requires_grad_(), checks.random_logits(N, V, seed=1)
    ids = torch.randint(V, (N,))
    teacher = DenseTargets.from_logits(teacher_logits)
    found = logit_terms(logits, lambda hidden: hidden, ids, teacher, TERMS, chunk_tokens=4)
    assert_same(found, whole(logits, lambda hidden: hidden, ids, teacher, TERMS), [logits])


@pytest.mark.parametrize("frozen", ["head", "hidden"])
def test_frozen_parts_get_no_gradient(frozen):
    hidden, ids, teacher = setting()
    head = SoftCap()
    (head if frozen == "head" else hidden).requires_grad_(False)
    found = logit_terms(hidden, head, ids, teacher, TERMS, head_parameters=list(head.parameters()), chunk_tokens=4)
    inputs = [hidden] if frozen == "head" else list(head.parameters())
    assert_same(found, whole(hidden, head, ids, teacher, TERMS), inputs)


def test_without_gradients_the_values_are_the_same_and_no_graph_is_built():
    hidden, ids, teacher = setting()
    head = SoftCap()
    with torch.no_grad():
        total, sums = logit_terms(hidden, head, ids, teacher, TERMS, head_parameters=list(head.parameters()))
    right = whole(hidden, head, ids, teacher, TERMS)
    assert not total.requires_grad
    assert_close(total, right[0].detach())
    assert_close(sums, right[1])


def test_no_scored_position_gives_zero_with_gradients():
    head = SoftCap()
    hidden = torch.empty(0, D, dtype=torch.float64, requires_grad=True)
    total, sums = logit_terms(
        hidden, head, torch.empty(0).long(), None, [TERMS[0]], head_parameters=[head.linear.weight]
    )
    assert total == 0
    assert sums["text"] == 0
    total.backward()
    assert hidden.grad.shape == (0, D)


def test_it_can_be_propagated_back_once():
    hidden, ids, teacher = setting()
    total, _ = logit_terms(hidden, SoftCap(), ids, teacher, TERMS)
    total.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="already propagated"):
        total.backward()


def test_half_precision_is_summed_in_float32():
    head = nn.Linear(D, V).bfloat16()
    hidden = torch.randn(N, D, dtype=torch.bfloat16, requires_grad=True)
    teacher = DenseTargets.from_logits(torch.randn(N, V, dtype=torch.bfloat16))
    total, sums = logit_terms(
        hidden, head, torch.randint(V, (N,)), teacher, TERMS, head_parameters=list(head.parameters()), chunk_tokens=4
    )
    assert total.dtype == sums["kl"].dtype == torch.float32
    total.backward()
    assert hidden.grad.dtype == head.weight.grad.dtype == torch.bfloat16
    right, _ = whole(hidden, head, torch.randint(V, (N,)), teacher, [TERMS[1]])
    assert_close(sums["kl"] * 0.7 * 4, right.detach(), rtol=0.02, atol=0.02)


def test_many_small_gradients_are_added_up_in_float32():
    """Adding the same bfloat16 number 1,500 times to itself in bfloat16 stops short at 256."""
    head = nn.Linear(D, V).bfloat16()
    hidden = torch.ones(1500, D, dtype=torch.bfloat16)
    gradients = [
        torch.autograd.grad(
            logit_terms(
                hidden, head, torch.zeros(1500).long(), None, TERMS[:1], head_parameters=[head.weight], chunk_tokens=n
            )[0],
            head.weight,
        )[0]
        for n in (1, 1500)
    ]
    assert_close(*gradients, rtol=0.02, atol=0.02)


def test_autocast():
    """float32 parameters, bfloat16 products: near the float32 gradients, and in float32."""
    head = nn.Linear(D, V)
    hidden, ids = torch.randn(N, D, requires_grad=True), torch.randint(V, (N,))
    teacher = DenseTargets.from_logits(torch.randn(N, V))
    right = torch.autograd.grad(whole(hidden, head, ids, teacher, TERMS)[0], [hidden, head.weight])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = logit_terms(
            hidden, head, ids, teacher, TERMS, head_parameters=[head.weight, head.bias], chunk_tokens=4
        )
    found = torch.autograd.grad(total, [hidden, head.weight])
    assert found[1].dtype == torch.float32
    assert_close(found, right, rtol=0.05, atol=0.05)


def test_gradients_accumulate_over_micro_batches():
    hidden, ids, teacher = setting()
    head = SoftCap()
    parameters = list(head.parameters())
    right = torch.autograd.grad(whole(hidden, head, ids, teacher, TERMS)[0], parameters)
    for rows in (slice(0, 6), slice(6, N)):
        part = DenseTargets(teacher.hidden_BTD[rows], teacher.head)
        logit_terms(hidden[rows], head, ids[rows], part, TERMS, head_parameters=parameters)[0].backward()
    assert_close([p.grad for p in parameters], list(right), rtol=1e-10, atol=1e-10)


def test_diagnoses():
    hidden, ids, teacher = setting()
    head = SoftCap()
    student_logits, teacher_logits = head(hidden).detach(), teacher.head(teacher.hidden_BTD).detach()
    _, sums = logit_terms(hidden, head, ids, teacher, TERMS, chunk_tokens=4, diagnose=True)
    entropies = [
        torch.distributions.Categorical(logits=logits).entropy().sum() for logits in (student_logits, teacher_logits)
    ]
    agreed = (student_logits.argmax(-1) == teacher_logits.argmax(-1)).sum().double()
    assert_close(sums["entropy.student"], entropies[0])
    assert_close(sums["entropy.teacher"], entropies[1])
    assert_close(sums["agreement"], agreed)
    kept = checks.keep_top(teacher_logits, 3, unused=1)
    _, sums = logit_terms(hidden, head, ids, kept, [TERMS[0]], chunk_tokens=4, diagnose=True)
    assert_close(sums["agreement"], agreed)
    assert "entropy.teacher" not in sums


def test_the_teachers_head_is_not_run_for_the_text_alone():
    hidden, ids, teacher = setting()

    def never(hidden):
        raise AssertionError("not needed")

    logit_terms(hidden, SoftCap(), ids, DenseTargets(teacher.hidden_BTD, never), [TERMS[0]])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_teacher_that_gives_no_numbers_is_named(bad):
    hidden, ids, _ = setting()
    logits = torch.randn(N, V).double()
    logits[6, 2] = logits[9, 0] = bad
    with pytest.raises(TrainingError, match="at 2 of 13 scored positions, first at scored position 6"):
        logit_terms(hidden, SoftCap(), ids, DenseTargets.from_logits(logits), TERMS, chunk_tokens=4)
    kept = checks.keep_top(torch.randn(N, V).double(), 3)
    kept.log_probs_BTK[6, 1] = bad
    with pytest.raises(TrainingError, match="at 1 of 13 scored positions, first at scored position 6"):
        logit_terms(hidden, SoftCap(), ids, kept, [TERMS[1]], chunk_tokens=4)


def test_a_position_without_targets_is_named():
    hidden, ids, _ = setting()
    kept = checks.keep_top(torch.randn(N, V).double(), 3)
    kept.ids_BTK[4], kept.log_probs_BTK[4], kept.tail_log_prob_BT[4] = -1, -torch.inf, -torch.inf
    with pytest.raises(TrainingError, match="first at scored position 4"):
        logit_terms(hidden, SoftCap(), ids, kept, [TERMS[1]], chunk_tokens=4)


def test_vocabularies_that_do_not_fit_are_refused():
    hidden, ids, _ = setting()
    with pytest.raises(VocabularyError, match="the teacher gives 12 logits a position and the student 11"):
        logit_terms(hidden, SoftCap(), ids, DenseTargets.from_logits(torch.randn(N, 12).double()), TERMS)
    kept = checks.keep_top(torch.randn(N, V).double(), 3)
    kept.ids_BTK[4, 1] = V
    with pytest.raises(VocabularyError, match="token 11"):
        logit_terms(hidden, SoftCap(), ids, kept, [TERMS[1]])


def test_terms_of_one_name_are_refused():
    hidden, ids, _ = setting()
    with pytest.raises(ValueError, match="a name of its own, got text, text"):
        logit_terms(hidden, SoftCap(), ids, None, [TERMS[0], TERMS[0]])


def test_no_tensor_of_all_logits_is_made():
    """Whatever the head gives out is at most a chunk long, and is freed with it."""
    hidden, ids, teacher = setting()
    head, rows, alive = SoftCap(), [], []
    import weakref

    def watched(hidden_nD):
        logits = head(hidden_nD)
        assert sum(reference() is not None for reference in alive) == 0
        rows.append(logits.shape[0])
        alive.append(weakref.ref(logits))
        return logits

    total, _ = logit_terms(
        hidden, watched, ids, teacher, TERMS, head_parameters=list(head.parameters()), chunk_tokens=4
    )
    assert rows == [4, 4, 4, 1]
    assert all(reference() is None for reference in alive)
    total.backward()


def test_automatic_chunks_bound_the_memory():
    hidden = torch.empty(0, 16)
    weight = torch.empty(150_000, 16, device="meta")
    wide = nn.Linear(16, 150_000, bias=False, device="meta")
    assert chunked._rows_within(hidden, wide, [weight]) * 150_000 * 4 <= chunked.CHUNK_BYTES["cpu"]
    assert chunked._rows_within(hidden, wide, [torch.empty(10**9, 1, device="meta")]) == 1
    # A head that is not trained has no parameters to tell, and is as wide.
    frozen = chunked._rows_within(torch.ones(3, 16), nn.Linear(16, 5_000), [])
    assert 0.9 * chunked.CHUNK_BYTES["cpu"] < frozen * 5_000 * 4 <= chunked.CHUNK_BYTES["cpu"]


def test_scored_rows_shift_the_mask():
    def loss(logits, ids, mask):
        targets = DenseTargets.from_logits(torch.zeros_like(logits))
        total, _ = logit_terms(
            scored_rows(logits, mask), lambda rows: rows, scored_ids(ids, mask), scored_targets(targets, mask),
            [LogitTerm("text", 1.0, "cross_entropy")],
        )  # fmt: skip
        return total

    checks.check_mask_is_shifted(loss)


def test_scored_targets_keep_rows_together():
    ids, mask = torch.randint(V, (2, 6)), torch.rand(2, 6) > 0.4
    logits = torch.randn(2, 6, V).double()
    kept = checks.keep_top(logits.flatten(0, 1), 3)
    sparse = SparseTargets(
        kept.ids_BTK.view(2, 6, 3), kept.log_probs_BTK.view(2, 6, 3), kept.tail_log_prob_BT.view(2, 6),
        torch.rand(2, 6, 3),
    )  # fmt: skip
    expected = [(row, t - 1) for row in range(2) for t in range(1, 6) if mask[row, t]]
    dense = scored_targets(DenseTargets.from_logits(logits), mask).hidden_BTD
    rows = scored_targets(sparse, mask)
    assert scored_targets(None, mask) is None
    assert dense.shape[0] == rows.ids_BTK.shape[0] == len(expected)
    for n, (row, t) in enumerate(expected):
        assert_close(dense[n], logits[row, t])
        assert_close(rows.ids_BTK[n], sparse.ids_BTK[row, t])
        assert_close(rows.log_probs_BTK[n], sparse.log_probs_BTK[row, t])
        assert_close(rows.tail_log_prob_BT[n], sparse.tail_log_prob_BT[row, t])
        assert_close(rows.weights_BTK[n], sparse.weights_BTK[row, t])
        assert scored_ids(ids, mask)[n] == ids[row, t + 1]


class Whole(nn.Module):
    """A body and a head, trained through `logit_terms` in its forward pass, as a lesson is."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, D).double(), SoftCap()

    def forward(self, inputs, ids, targets):
        hidden = torch.tanh(self.body(inputs))
        return logit_terms(
            hidden, self.head, ids, targets, TERMS, head_parameters=list(self.head.parameters()), chunk_tokens=3
        )[0]


def _train_part(number, address, state, inputs, ids, logits, queue):
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    dist.init_process_group("gloo", init_method=address, rank=number, world_size=2)
    torch.set_num_threads(1)
    model = Whole()
    model.load_state_dict(state)
    runner = DistributedDataParallel(model)
    mine = slice(number * 6, (number + 1) * 6)
    (runner(inputs[mine], ids[mine], DenseTargets.from_logits(logits[mine])) * 2).backward()
    if number == 0:
        queue.put({name: p.grad.tolist() for name, p in model.named_parameters()})
    dist.barrier()
    del runner  # one that outlives its process group can wait for ever
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_the_gradients_of_one(tmp_path):
    import torch.multiprocessing as mp

    model = Whole()
    inputs, ids, logits = torch.randn(12, 4).double(), torch.randint(V, (12,)), torch.randn(12, V).double()
    state = copy.deepcopy(model.state_dict())
    context = mp.get_context("spawn")
    queue = context.Queue()
    address = f"file://{tmp_path / 'meeting'}"
    workers = [
        context.Process(target=_train_part, args=(number, address, state, inputs, ids, logits, queue))
        for number in range(2)
    ]
    for worker in workers:
        worker.start()
    found = queue.get(timeout=120)
    for worker in workers:
        worker.join(timeout=60)
        assert worker.exitcode == 0
    model(inputs, ids, DenseTargets.from_logits(logits)).backward()
    for name, parameter in model.named_parameters():
        assert_close(torch.tensor(found[name], dtype=torch.float64), parameter.grad, rtol=1e-10, atol=1e-10)
