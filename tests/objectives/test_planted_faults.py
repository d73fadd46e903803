"""Faults that were found in the wild, planted here: the checks must turn red on each of them."""

import functools

import pytest
import torch
from tests.objectives import checks, test_chunked
from torch.nn import functional as F

from limbeck.objectives import chunked, combine, terms
from limbeck.objectives.divergences import Comparison, forward_kl, jensen_shannon
from limbeck.objectives.sparse import sparse_divergence
from limbeck.objectives.terms import LogitTerm


def red(check, *arguments, **options):
    """The check fails, and it is the assertion that does."""
    with pytest.raises(AssertionError):
        check(*arguments, **options)


def test_dropping_the_entropy_term_is_seen():
    """The teacher's cross-entropy called a KL: right gradients, but not zero on equals."""
    faulty = Comparison(lambda student, teacher: -(teacher.exp() * student).sum(-1))
    red(checks.check_by_hand, "forward_kl", faulty)
    red(checks.check_reference, "forward_kl", faulty)
    red(checks.check_zero_on_equals, faulty)


def test_the_wrong_direction_is_seen():
    faulty = Comparison(lambda student, teacher: forward_kl.of_log_probs(teacher, student))
    red(checks.check_by_hand, "forward_kl", faulty)
    red(checks.check_reference, "forward_kl", faulty)


def test_a_swapped_share_is_seen():
    def faulty(student, teacher, *, temperature=1.0, beta=0.5):
        return jensen_shannon(student, teacher, temperature=temperature, beta=1 - beta)

    red(checks.check_reference, "jensen_shannon", faulty, beta=0.9)


def test_a_mean_over_the_vocabulary_is_seen():
    faulty = Comparison(lambda student, teacher: forward_kl.of_log_probs(student, teacher) / student.shape[-1])
    red(checks.check_by_hand, "forward_kl", faulty)
    red(checks.check_reference, "forward_kl", faulty)


def test_a_gradient_cut_in_the_student_is_seen():
    faulty = Comparison(lambda student, teacher: (student.exp().detach() * (student - teacher)).sum(-1))
    checks.check_by_hand("reverse_kl", faulty)
    red(checks.check_reference, "reverse_kl", faulty)


def test_one_side_left_unsoftened_is_seen():
    def faulty(student, teacher, *, temperature):
        return forward_kl.of_log_probs((student / temperature).log_softmax(-1), teacher.log_softmax(-1))

    red(checks.check_reference, "forward_kl", faulty, temperature=2.0)


def unshifted(values_BTX, loss_mask_BT):
    return values_BTX[loss_mask_BT]


def test_an_unshifted_mask_is_seen(monkeypatch):
    test_chunked.test_scored_rows_shift_the_mask()
    monkeypatch.setattr(test_chunked, "scored_rows", unshifted)
    red(test_chunked.test_scored_rows_shift_the_mask)


def test_unshifted_targets_are_seen(monkeypatch):
    test_chunked.test_scored_targets_keep_rows_together()
    monkeypatch.setattr(combine, "scored_rows", unshifted)
    red(test_chunked.test_scored_targets_keep_rows_together)


def test_an_unshifted_mask_and_labels_that_agree_are_seen():
    """Mask and labels shifted neither: the loss scores every token against its own position."""

    def faulty(logits, ids, mask):
        return F.cross_entropy(logits[mask], ids[mask], reduction="sum")

    red(checks.check_mask_is_shifted, faulty)


@pytest.mark.parametrize("power", [0, 1, -2])
def test_a_wrong_temperature_factor_is_seen(power):
    def total(student, teacher, heat, *, power=power):
        return heat**power * forward_kl(student, teacher, temperature=heat).sum()

    checks.check_temperature_factor(functools.partial(total, power=2))
    red(checks.check_temperature_factor, total)


def test_a_wrong_temperature_factor_in_the_sum_is_seen(monkeypatch):
    monkeypatch.setattr(LogitTerm, "factor", property(lambda term: term.weight * term.temperature))
    red(test_chunked.test_chunked_is_whole_with_sparse_targets_at_a_temperature)
    red(test_chunked.test_logits_that_exist_already)


def test_a_renormalised_top_k_passing_as_tail_is_seen():
    """With every token kept the two are the same, so only the check with a real tail can see it."""
    faulty = functools.partial(sparse_divergence, "forward_kl", missing="renormalise")
    checks.check_full_top_k_is_dense(faulty, forward_kl)
    red(checks.check_tail_is_a_bucket, "forward_kl", faulty)
    red(checks.check_zero_on_equals, lambda student, teacher: faulty(student, checks.keep_top(teacher, 3)))


def test_a_student_scaled_up_to_the_kept_tokens_is_seen():
    def faulty(student, targets):
        used = targets.ids_BTK.clamp_min(0)
        kept = student.gather(-1, used).masked_fill(targets.ids_BTK < 0, -torch.inf)
        return forward_kl(kept, targets.log_probs_BTK)

    red(checks.check_tail_is_a_bucket, "forward_kl", faulty)


def test_a_tail_bucket_missing_in_the_sum_is_seen():
    def faulty(student, targets):
        logp = student.log_softmax(-1).gather(-1, targets.ids_BTK.clamp_min(0))
        teacher = targets.log_probs_BTK
        return torch.where(targets.ids_BTK < 0, 0.0, teacher.exp() * (teacher - logp)).sum(-1)

    red(checks.check_tail_is_a_bucket, "forward_kl", faulty)


def test_gradients_of_one_chunk_alone_are_seen(monkeypatch):
    def keep_the_last(sums, parts):
        sums[:] = parts

    monkeypatch.setattr(chunked, "_accumulate", keep_the_last)
    red(test_chunked.test_chunked_is_whole_with_sparse_targets, "tail")


def test_a_shared_gradient_added_to_twice_is_seen(monkeypatch):
    def add(sums, parts):
        for index, part in enumerate(parts):
            sums[index] = part if sums[index] is None else sums[index].add_(part)

    monkeypatch.setattr(chunked, "_accumulate", add)
    red(test_chunked.test_a_head_whose_parameters_share_one_gradient)


def test_a_lost_scale_in_the_backward_pass_is_seen(monkeypatch):
    faulty = staticmethod(lambda ctx, grad: (None, *ctx.gradients))
    monkeypatch.setattr(chunked._ChunkedTerms, "backward", faulty)
    red(test_chunked.test_chunked_is_whole_with_sparse_targets, "tail")


def test_blocks_that_miss_rows_are_seen(monkeypatch):
    monkeypatch.setattr(chunked, "_blocks", lambda logits: iter([slice(0, logits.shape[0] - 1)]))
    red(test_chunked.test_chunked_is_whole_with_sparse_targets, "tail")


def test_teachers_rows_out_of_step_are_seen(monkeypatch):
    real = chunked._Job.teacher_of

    def shifted(job, rows, like):
        return real(job, slice(max(0, rows.start - 1), max(0, rows.start - 1) + rows.stop - rows.start), like)

    monkeypatch.setattr(chunked._Job, "teacher_of", shifted)
    red(test_chunked.test_logits_that_exist_already)


def test_weights_of_draws_left_out_are_seen(monkeypatch):
    from tests.objectives import test_sparse

    def faulty(name, student, targets, **settings):
        kept = student.log_softmax(-1).gather(-1, targets.ids_BTK.clamp_min(0))
        return torch.where(targets.ids_BTK < 0, 0.0, targets.log_probs_BTK - kept).mean(-1)

    monkeypatch.setattr(test_sparse, "sparse_divergence", faulty)
    red(test_sparse.test_sampled_targets_by_hand)
    red(test_sparse.test_sampled_targets_estimate_the_dense_value_and_gradient_without_bias, 0.7)


def test_a_softened_cache_under_the_wrong_temperature_is_seen(monkeypatch):
    from tests.objectives import test_terms

    real = terms.log_probs
    monkeypatch.setattr(terms, "log_probs", lambda logits, heat: real(logits, 1.0))
    red(test_terms.test_values_are_those_of_the_objectives)
