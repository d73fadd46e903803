import math

import pytest
import torch
from tests.objectives import trie_toys as toys
from tests.objectives.trie_toys import END, PATCH_BYTES, PIECES

from limbeck.core.symbols import EOD, EOP, PAD, SYMBOLS
from limbeck.core.types import SparseTargets
from limbeck.models.byte_trie import ByteTrie
from limbeck.objectives.byte_trie import (
    FULL,
    INSIDE,
    START,
    entry_weights,
    merge_paths,
    node_log_conditionals,
    path_divergence,
    path_log_probs,
    path_weights,
    range_sums,
)

TRIE = ByteTrie.build(PIECES, END, patch_bytes=PATCH_BYTES)
PREFIXES = sorted({piece[:n] for piece in PIECES if piece for n in range(len(piece) + 1)})


def conditionals(log_probs_NV, prefixes, states, rows=None):
    return node_log_conditionals(
        entry_weights(log_probs_NV, TRIE.nodes), TRIE.nodes,
        row_M=torch.tensor(rows or [0] * len(prefixes)),
        node_M=torch.tensor([TRIE.find(prefix) if prefix else 0 for prefix in prefixes]), state_M=torch.tensor(states),
    )  # fmt: skip


def test_conditionals_by_hand():
    """Tokens a (0.1), ab (0.2), b (0.3), the end (0.4)."""
    trie = ByteTrie.build([b"a", b"ab", b"b", None], 3)
    weights = entry_weights(torch.tensor([[0.1, 0.2, 0.3, 0.4]]).log(), trie.nodes)
    found, mass = node_log_conditionals(
        weights, trie.nodes, row_M=torch.zeros(3, dtype=torch.long),
        node_M=torch.tensor([0, trie.find(b"a"), trie.find(b"ab")]), state_M=torch.tensor([START, INSIDE, INSIDE]),
    )  # fmt: skip
    expected = torch.zeros(3, SYMBOLS, dtype=torch.float64)
    expected[0, [97, 98, EOD]] = torch.tensor([0.3, 0.3, 0.4], dtype=torch.float64)
    expected[1, [98, EOP]] = torch.tensor([2 / 3, 1 / 3], dtype=torch.float64)
    expected[2, EOP] = 1
    torch.testing.assert_close(found.exp(), expected, atol=1e-7, rtol=0)
    torch.testing.assert_close(mass.exp(), torch.tensor([1.0, 0.3, 0.2], dtype=torch.float64), atol=1e-7, rtol=0)


def test_conditionals_against_a_slow_reading():
    """At every node in every state, under several distributions at once; the order of positions does not matter."""
    log_probs = toys.log_probs_of(3)
    order = torch.randperm(3 * len(PREFIXES)).tolist()
    rows = [place % 3 for place in order]
    prefixes = [PREFIXES[place // 3] for place in order]
    states = [START if prefix == b"" else INSIDE for prefix in prefixes]
    found, mass = conditionals(log_probs, prefixes, states, rows)
    for row, prefix, found_S, share in zip(rows, prefixes, found, mass, strict=True):
        expected = toys.conditional(log_probs[row].exp(), prefix)
        torch.testing.assert_close(found_S.exp(), expected, atol=1e-15, rtol=1e-13)
        known = toys.masses(log_probs[row].exp())
        torch.testing.assert_close(float(share), math.log(known[prefix] / known[b""]), atol=1e-12, rtol=0)


def test_a_patch_that_goes_on_does_not_end_and_a_full_one_does():
    log_probs = toys.log_probs_of(1)
    found, mass = conditionals(log_probs, [b"abca", b"abca", b"cccc", b"b "], [START, FULL, START, START])
    torch.testing.assert_close(found[0].exp(), toys.conditional(log_probs[0].exp(), b"abca", may_end=False))
    assert found[0, EOP] == -math.inf
    assert found[1].exp().tolist() == [float(symbol == EOP) for symbol in range(SYMBOLS)]
    assert found[2].argmax() == ord("c")
    # No token goes on from "b ": nothing is said, and the mass says so.
    assert mass[3] == -math.inf
    assert bool((found[3] == -math.inf).all())


def test_the_product_along_a_token_is_its_probability():
    log_probs = toys.log_probs_of(1, seed=1)
    expected = toys.path_probs(log_probs[0].exp())
    for path, probability in expected.items():
        prefixes = [bytes(path[:n]) for n in range(len(path))]
        states = [START if n == 0 else FULL if n == PATCH_BYTES - 1 else INSIDE for n in range(len(path))]
        found, _ = conditionals(log_probs, prefixes, states)
        along = found[torch.arange(len(path)), torch.tensor(path)].sum()
        assert abs(float(along.exp()) - probability) < 1e-12 * probability


def test_unlikely_nodes_are_as_precise_as_likely_ones():
    """A prefix with 1e-200 of the mass, between likely ones: differences of sums would give noise, or zero."""
    log_probs = torch.full((1, len(PIECES)), -3.0, dtype=torch.float64)
    log_probs[0, [4, 5, 6, 8, 9]] = torch.tensor([1e-200, 3e-201, 4e-200, 2e-201, 5e-205], dtype=torch.float64).log()
    found, mass = conditionals(log_probs, [b"ab", b"abc", b"abca"], [INSIDE, INSIDE, INSIDE])
    for prefix, found_S in zip([b"ab", b"abc", b"abca"], found, strict=True):
        expected = toys.conditional(log_probs[0].exp(), prefix)
        torch.testing.assert_close(found_S.exp(), expected, atol=0, rtol=1e-13)
    assert mass[0] < math.log(1e-190)


def test_range_sums_keep_small_sums_beside_large_values():
    values = torch.tensor([[1.0, 1e-30, 2e-30, 1.0], [4.0, 5.0, 6.0, 7.0]], dtype=torch.float64)
    row, low, high = (torch.tensor(part) for part in ([0, 0, 1, 1, 0], [1, 0, 0, 3, 2], [3, 4, 3, 4, 2]))
    found = range_sums(values, row, low, high)
    torch.testing.assert_close(
        found, torch.tensor([3e-30, 2.0, 15.0, 7.0, 0.0], dtype=torch.float64), rtol=1e-15, atol=0
    )


def student_logits(seed):
    """A student's logits at every node, in both states where a patch can be at one, forbidden symbols far below."""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(PREFIXES), SYMBOLS, generator=generator, dtype=torch.float64)
    for number, prefix in enumerate(PREFIXES):
        logits[number, [PAD, PAD + 1]] = -1e9
        logits[number, EOP if prefix == b"" else EOD] = -1e9
        if len(prefix) == PATCH_BYTES - 1:
            logits[number, :256] = -1e9
    return logits.requires_grad_()


def paths_of_student(logits):
    """The student's log-probability of every first patch of the vocabulary."""
    number = {prefix: place for place, prefix in enumerate(PREFIXES)}
    log_probs = logits.log_softmax(-1)
    paths = sorted(toys.path_probs(torch.ones(len(PIECES))))
    return paths, torch.stack(
        [sum(log_probs[number[bytes(path[:n])], symbol] for n, symbol in enumerate(path)) for path in paths]
    )


def dense_kl(logits, teacher_V):
    expected = toys.path_probs(teacher_V.exp())
    paths, student = paths_of_student(logits)
    teacher = torch.tensor([expected[path] for path in paths], dtype=torch.float64)
    return (teacher * (teacher.log() - student)).sum()


def test_token_kl_is_the_sum_over_nodes_of_mass_times_kl():
    teacher = toys.log_probs_of(1, seed=2)
    logits = student_logits(3)
    inner = [place for place, prefix in enumerate(PREFIXES) if len(prefix) < PATCH_BYTES]
    states = [
        START if not PREFIXES[place] else FULL if len(PREFIXES[place]) == PATCH_BYTES - 1 else INSIDE for place in inner
    ]
    found, mass = conditionals(teacher, [PREFIXES[place] for place in inner], states)
    student = logits.log_softmax(-1)[inner]
    kl = torch.where(found > -math.inf, found.exp() * (found - student), 0.0).sum(-1)
    total, expected = (mass.exp() * kl).sum(), dense_kl(logits, teacher[0])
    torch.testing.assert_close(total, expected, atol=1e-10, rtol=0)
    (gradient,) = torch.autograd.grad(total, logits)
    (wanted,) = torch.autograd.grad(dense_kl(logits, teacher[0]), logits)
    torch.testing.assert_close(gradient, wanted, atol=1e-10, rtol=0)


def decoded(logits, paths, patches):
    """What a student's decoder would give for these paths of these patches, whose logits are [patches, prefixes, V]."""
    number = {prefix: place for place, prefix in enumerate(PREFIXES)}
    symbols = torch.full((len(paths), PATCH_BYTES), PAD)
    rows = []
    for row, path in enumerate(paths):
        symbols[row, : len(path)] = torch.tensor(path)
        used = [logits[patches[row], number[bytes(path[:n])]] for n in range(len(path))]
        rows.append(torch.stack(used + [torch.zeros(SYMBOLS, dtype=torch.float64)] * (PATCH_BYTES - len(path))))
    return torch.stack(rows), symbols


def all_paths_loss(logits, teacher, divergence="forward_kl", keep=None):
    """`path_divergence` with the teacher's `keep` likeliest paths (None: all)."""
    expected = toys.path_probs(teacher.exp())
    ranked = sorted(expected, key=lambda path: -expected[path])
    paths = ranked[:keep]
    rows, symbols = decoded(logits[None], paths, [0] * len(paths))
    path_R, rest_N = path_log_probs(rows, symbols, torch.zeros(len(paths), dtype=torch.long), patches=1)
    tail = math.fsum(expected[path] for path in ranked[len(paths) :])
    targets = SparseTargets(
        torch.arange(len(paths))[None], torch.tensor([[expected[path] for path in paths]], dtype=torch.float64).log(),
        torch.tensor([tail], dtype=torch.float64).log(),
    )  # fmt: skip
    return path_divergence(divergence, path_R[None], rest_N, targets).sum()


def test_all_paths_give_the_token_kl():
    teacher, logits = toys.log_probs_of(1, seed=4)[0], student_logits(5)
    loss, expected = all_paths_loss(logits, teacher), dense_kl(logits, teacher)
    torch.testing.assert_close(loss, expected, atol=1e-10, rtol=0)
    (gradient,) = torch.autograd.grad(loss, logits)
    (wanted,) = torch.autograd.grad(dense_kl(logits, teacher), logits)
    torch.testing.assert_close(gradient, wanted, atol=1e-10, rtol=0)


def test_fewer_paths_never_give_more():
    teacher, logits = toys.log_probs_of(1, seed=4)[0], student_logits(5)
    values = [float(all_paths_loss(logits, teacher, keep=keep)) for keep in range(1, len(toys.path_probs(teacher)) + 1)]
    assert values == sorted(values)
    assert 0 < values[0] < values[-1]


@pytest.mark.parametrize("divergence", ["jensen_shannon", "total_variation", "skewed_forward_kl", "alpha_beta"])
def test_divergences_are_zero_on_equals_and_have_gradients(divergence):
    teacher = toys.log_probs_of(1, seed=6)[0]
    states = [START if not p else FULL if len(p) == PATCH_BYTES - 1 else INSIDE for p in PREFIXES]
    own = conditionals(teacher[None], PREFIXES, states)[0].clamp_min(-1e9)
    torch.testing.assert_close(
        all_paths_loss(own, teacher, divergence, keep=3), torch.zeros((), dtype=torch.float64), atol=1e-12, rtol=0
    )
    logits = (own.clamp_min(-9) + torch.randn_like(own)).requires_grad_()
    (gradient,) = torch.autograd.grad(all_paths_loss(logits, teacher, divergence, keep=3), logits)
    assert bool(gradient.isfinite().all())
    assert float(gradient.abs().max()) > 1e-4


def test_paths_of_several_patches_against_one_minus_their_sum():
    """The rest is what is left of one; the paths of different patches do not touch."""
    logits = torch.stack([student_logits(8), student_logits(9)]).detach().requires_grad_()
    some = [
        (0, (97, EOP)),
        (0, (97, 98, EOP)),
        (1, (97, EOP)),
        (1, (EOD,)),
        (0, (99, 99, 99, 99, EOP)),
        (1, (98, 32, EOP)),
    ]
    rows, symbols = decoded(logits, [path for _, path in some], [patch for patch, _ in some])
    patch_R = torch.tensor([patch for patch, _ in some])
    path_R, rest_N = path_log_probs(rows, symbols, patch_R, patches=2)
    number = {prefix: place for place, prefix in enumerate(PREFIXES)}
    expected_R = torch.stack(
        [
            sum(logits[patch, number[bytes(path[:n])]].log_softmax(-1)[symbol] for n, symbol in enumerate(path))
            for patch, path in some
        ]
    )
    torch.testing.assert_close(path_R, expected_R, atol=1e-12, rtol=0)
    taken_N = torch.zeros(2, dtype=torch.float64).index_add(0, patch_R, expected_R.exp())
    torch.testing.assert_close(rest_N.exp(), 1 - taken_N, atol=1e-12, rtol=0)
    (gradient,) = torch.autograd.grad(rest_N.sum(), logits, retain_graph=True)
    (wanted,) = torch.autograd.grad((1 - taken_N).log().sum(), logits)
    torch.testing.assert_close(gradient, wanted, atol=1e-10, rtol=0)


def test_a_small_rest_is_exact():
    """A student that is sure: one minus the paths would be rounding alone."""
    logits = torch.full((len(PREFIXES), SYMBOLS), -90.0, dtype=torch.float64)
    logits[PREFIXES.index(b""), 97] = 0
    logits[PREFIXES.index(b"a"), EOP] = 0
    rows, symbols = decoded(logits[None], [(97, EOP)], [0])
    _, rest = path_log_probs(rows, symbols, torch.zeros(1, dtype=torch.long), patches=1)
    expected = math.log(2 * (SYMBOLS - 1)) - 90
    torch.testing.assert_close(float(rest), expected, atol=1e-10, rtol=0)


def test_unused_places_and_temperature():
    """-1 in unused places changes nothing, and buckets are softened as `missing: tail` does it."""
    student, rest = torch.tensor([[0.5, 0.2, 0.9]]).log(), torch.tensor([0.3]).log()
    targets = SparseTargets(
        torch.tensor([[3, 7, -1]]), torch.tensor([[0.6, 0.3, 0.0]]).log(), torch.tensor([0.1]).log()
    )
    soft = [torch.tensor(values).sqrt() for values in ([0.6, 0.3, 0.1], [0.5, 0.2, 0.3])]
    p, q = (values / values.sum() for values in soft)
    expected = (p * (p / q).log()).sum()
    torch.testing.assert_close(path_divergence("forward_kl", student, rest, targets, temperature=2.0)[0], expected)
    with pytest.raises(ValueError, match="forward_kl"):
        path_divergence("forwrad_kl", student, rest, targets)


def test_tokens_of_one_path_stand_together():
    weights = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0]], dtype=torch.float64)
    found = path_weights(weights, torch.tensor([4, 4, -1, 4, 4]))
    assert found.tolist() == [[3.0, 0.0, 0.0, 9.0, 0.0]]
    assert weights.tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]


def test_merging_kept_tokens_by_path():
    ids = torch.tensor([[3, -1, 5, 3, 2], [-1, -1, -1, -1, -1]])
    logs = torch.tensor([[0.1, 0.5, 0.15, 0.1, 0.05], [0.2, 0.2, 0.2, 0.2, 0.2]]).log()
    found, merged = merge_paths(ids, logs)
    assert found.tolist() == [[3, 5, 2, -1, -1], [-1] * 5]
    expected = torch.tensor([[0.2, 0.15, 0.05, 0.0, 0.0], [0.0] * 5])
    torch.testing.assert_close(merged.exp(), expected)
