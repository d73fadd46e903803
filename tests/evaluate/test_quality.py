import math

import pytest
import torch
from tests.evaluate.small_models import VOCABULARY, FixedLogits, build_model

from limbeck.core.errors import DataError, LimbeckError, TeacherError
from limbeck.evaluate import scoring
from limbeck.evaluate.quality import (
    TextScore,
    compare_models,
    paired_difference,
    pool_scores,
    score_text,
    zeroed_mixers,
)
from limbeck.evaluate.scoring import NonFiniteLogits, ratio_standard_error

DOCUMENTS = ["the cat sat on the mat and the dog ran", "a dog", "on the mat the cät ran to the dog and sat", "z"]
UNIFORM = FixedLogits(torch.zeros(VOCABULARY))


@torch.no_grad()
def brute_force_log_probabilities(model, tokenizer, text, *, context, stride):
    """One forward pass per token, over exactly the context that the protocol gives it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tokenizer.bos_token_id is not None:
        ids = [tokenizer.bos_token_id, *ids]
    for target in range(1, len(ids)):
        start = max(0, math.ceil((target - context) / stride)) * stride
        logits_V = model(input_ids=torch.tensor([ids[start:target]])).logits[0, -1]
        yield logits_V.log_softmax(-1), ids[target]


@pytest.mark.parametrize(("context", "stride"), [(4, 4), (7, 3), (7, 1), (60, 60)])
@pytest.mark.parametrize("bos", [True, False])
def test_score_agrees_with_one_pass_per_token(model, bos_tokenizer, plain_tokenizer, bos, context, stride):
    tokenizer = bos_tokenizer if bos else plain_tokenizer
    expected = [
        -float(log_p_V[target])
        for text in DOCUMENTS
        for log_p_V, target in brute_force_log_probabilities(model, tokenizer, text, context=context, stride=stride)
    ]
    for batch in (1, 3):
        score = score_text(
            model, tokenizer, DOCUMENTS, context_tokens=context, stride_tokens=stride, batch_sequences=batch
        )
        assert score.tokens == len(expected)
        torch.testing.assert_close(score.nats, sum(expected), rtol=1e-10, atol=0)


def test_comparison_agrees_with_one_pass_per_token(model, other_model, plain_tokenizer):
    divergences, agreements = [], []
    for text in DOCUMENTS:
        walk = [
            brute_force_log_probabilities(one, plain_tokenizer, text, context=7, stride=3)
            for one in (model, other_model)
        ]
        for (teacher_V, _), (student_V, _) in zip(*walk, strict=True):
            divergences.append(float((teacher_V.exp() * (teacher_V - student_V)).sum()))
            agreements.append(float(teacher_V.argmax() == student_V.argmax()))
    found = compare_models(model, other_model, plain_tokenizer, DOCUMENTS, context_tokens=7, stride_tokens=3)
    assert found.tokens == len(divergences)
    torch.testing.assert_close(found.kl_nats, sum(divergences) / len(divergences), rtol=1e-10, atol=0)
    assert found.top1_agreement == pytest.approx(sum(agreements) / len(agreements))
    assert found.kl_nats > 0.01


def test_uniform_predictions_by_hand(bos_tokenizer):
    text = "the cat  sat on a mät"
    score = score_text(UNIFORM, bos_tokenizer, [text], context_tokens=4)
    tokens = len(bos_tokenizer(text)["input_ids"])
    assert (score.tokens, score.words, score.bytes) == (tokens, 6, len(text.encode()))
    assert score.perplexity == pytest.approx(VOCABULARY)
    assert score.bits_per_byte == pytest.approx(tokens * math.log2(VOCABULARY) / len(text.encode()))
    assert score.word_perplexity == pytest.approx(VOCABULARY ** (tokens / 6), rel=1e-5)


def test_documents_do_not_see_each_other(model, plain_tokenizer):
    apart = [score_text(model, plain_tokenizer, [text], context_tokens=16) for text in DOCUMENTS[:3]]
    together = score_text(model, plain_tokenizer, DOCUMENTS[:3], context_tokens=16)
    assert together.nats == pytest.approx(sum(score.nats for score in apart), rel=1e-12)
    assert together.bytes == sum(score.bytes for score in apart)


def test_a_short_stride_gives_more_context(model, plain_tokenizer):
    scores = {
        stride: score_text(model, plain_tokenizer, DOCUMENTS, context_tokens=8, stride_tokens=stride)
        for stride in (1, 8)
    }
    assert scores[1].tokens == scores[8].tokens
    assert scores[1].bytes == scores[8].bytes
    assert scores[1].nats != scores[8].nats


def test_max_tokens_scores_that_many(model, bos_tokenizer):
    score = score_text(model, bos_tokenizer, ["the cat sat on the mat"] * 4, context_tokens=8, max_tokens=7)
    assert score.tokens == 7
    assert score.protocol["max_tokens"] == 7
    assert 0 < score.bytes < 4 * len("the cat sat on the mat")


def test_piece_size_does_not_matter(model, other_model, plain_tokenizer, monkeypatch):
    options = {"context_tokens": 9, "stride_tokens": 5}
    before = score_text(model, plain_tokenizer, DOCUMENTS, **options)
    apart = compare_models(model, other_model, plain_tokenizer, DOCUMENTS, **options)
    monkeypatch.setattr(scoring, "TEMPORARY_BYTES", 8 * VOCABULARY * 24)
    after = score_text(model, plain_tokenizer, DOCUMENTS, **options)
    torch.testing.assert_close(after.nats, before.nats, rtol=1e-12, atol=0)
    again = compare_models(model, other_model, plain_tokenizer, DOCUMENTS, **options)
    torch.testing.assert_close(again.kl_nats, apart.kl_nats, rtol=1e-12, atol=0)


def test_pieces_stay_within_the_budget(model, plain_tokenizer, monkeypatch):
    monkeypatch.setattr(scoring, "TEMPORARY_BYTES", 8 * VOCABULARY * 12)
    plan = scoring.make_plan(
        [model], plain_tokenizer, DOCUMENTS, context=16, stride=None, max_tokens=None, batch_sequences=4,
        device=torch.device("cpu"),
    )  # fmt: skip
    pieces = [len(window_N) for window_N, _, _ in scoring.scored_logits({"model": model}, plan, temporaries=4)]
    assert max(pieces) == 3
    assert sum(pieces) == sum(document.tokens for document in plan.documents)


def test_half_precision_logits_are_summed_in_float32(plain_tokenizer):
    logits_V = torch.linspace(-3, 3, VOCABULARY).bfloat16()
    half = score_text(FixedLogits(logits_V), plain_tokenizer, DOCUMENTS, context_tokens=8)
    full = score_text(FixedLogits(logits_V.float()), plain_tokenizer, DOCUMENTS, context_tokens=8)
    assert half.nats == full.nats


def test_a_model_agrees_with_itself(model, plain_tokenizer):
    found = compare_models(model, model, plain_tokenizer, DOCUMENTS, context_tokens=8)
    assert (found.kl_nats, found.top1_agreement) == (0.0, 1.0)


def test_divergence_is_teacher_to_student_by_hand(plain_tokenizer):
    teacher_V, student_V = torch.full((2, VOCABULARY), -1e4)
    teacher_V[:2] = torch.tensor([0.75, 0.25]).log()
    student_V[:2] = torch.tensor([0.5, 0.5]).log() - torch.tensor([0.0, 1e-3])
    found = compare_models(FixedLogits(teacher_V), FixedLogits(student_V), plain_tokenizer, DOCUMENTS, context_tokens=8)
    expected = 0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5)
    assert found.kl_nats == pytest.approx(expected, abs=1e-3)
    assert found.top1_agreement == 1.0
    assert found.kl_standard_error == pytest.approx(0.0, abs=1e-6)


def test_different_vocabularies_cannot_be_compared(plain_tokenizer):
    with pytest.raises(TeacherError, match="vocabulary"):
        compare_models(UNIFORM, FixedLogits(torch.zeros(VOCABULARY + 1)), plain_tokenizer, DOCUMENTS, context_tokens=8)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_logits_that_are_not_finite_are_located(plain_tokenizer, value):
    ids = plain_tokenizer(DOCUMENTS[2])["input_ids"]
    place = next(place for place, token in enumerate(ids) if token not in plain_tokenizer(DOCUMENTS[0])["input_ids"])
    spoiled = FixedLogits(torch.zeros(VOCABULARY), spoiled=ids[place], value=value)
    with pytest.raises(NonFiniteLogits) as caught:
        score_text(spoiled, plain_tokenizer, [DOCUMENTS[0], "", DOCUMENTS[2]], context_tokens=4)
    assert isinstance(caught.value, LimbeckError)
    assert (caught.value.document, caught.value.token) == (2, place + 1)
    with pytest.raises(NonFiniteLogits, match="student"):
        compare_models(UNIFORM, spoiled, plain_tokenizer, [DOCUMENTS[2]], context_tokens=4)


@pytest.mark.parametrize(("context", "stride"), [(0, None), (8, 0), (8, 9)])
def test_windows_that_cannot_be_are_refused(model, plain_tokenizer, context, stride):
    with pytest.raises(DataError, match="context_tokens"):
        score_text(model, plain_tokenizer, DOCUMENTS, context_tokens=context, stride_tokens=stride)


def test_a_context_beyond_learned_positions_is_refused(plain_tokenizer):
    with pytest.raises(DataError, match="64"):
        score_text(build_model("gpt2"), plain_tokenizer, DOCUMENTS, context_tokens=65)


def test_another_models_tokenizer_is_refused(model, plain_tokenizer):
    small = build_model()
    small.resize_token_embeddings(20)
    with pytest.raises(DataError, match="tokenizer"):
        score_text(small, plain_tokenizer, DOCUMENTS, context_tokens=8)


def test_dropout_is_off_while_scoring_and_on_again_after(plain_tokenizer):
    dropping = build_model("gpt2")
    before = score_text(dropping, plain_tokenizer, DOCUMENTS, context_tokens=8)
    dropping.train()
    assert score_text(dropping, plain_tokenizer, DOCUMENTS, context_tokens=8).nats == before.nats
    assert dropping.training


def test_standard_error_by_hand():
    sums, counts = torch.tensor([3.0, 5.0, 10.0]).double(), torch.tensor([1.0, 2.0, 3.0]).double()
    residuals = [3 - 3 * 1, 5 - 3 * 2, 10 - 3 * 3]
    expected = math.sqrt(3 / 2 * sum(residual**2 for residual in residuals)) / 6
    assert ratio_standard_error(sums, counts) == pytest.approx(expected)
    assert ratio_standard_error(sums[:1], counts[:1]) is None


def test_standard_error_matches_repeated_sampling():
    """The spread of the estimate over many samples of blocks is what the formula says."""
    torch.manual_seed(3)
    estimates, errors = [], []
    for _ in range(400):
        counts = torch.randint(5, 20, (30,)).double()
        sums = 2.0 * counts + counts.sqrt() * torch.randn(30).double()
        estimates.append(float(sums.sum() / counts.sum()))
        errors.append(ratio_standard_error(sums, counts))
    assert torch.tensor(estimates).std() == pytest.approx(sum(errors) / len(errors), rel=0.1)


def test_blocks_are_documents_when_there_are_enough(model, plain_tokenizer):
    few = score_text(model, plain_tokenizer, DOCUMENTS[:2], context_tokens=4)
    many = score_text(model, plain_tokenizer, ["the cat sat", "a dog ran to the mat"] * 4, context_tokens=4)
    assert "windows of 4 tokens" in few.protocol["standard_error"]
    assert many.protocol["standard_error"] == "between 8 documents"
    assert len(many.block_nats) == 8
    assert sum(many.block_tokens) == many.tokens
    assert sum(many.block_nats) == pytest.approx(many.nats)


def test_paired_difference_by_hand(model, other_model, plain_tokenizer):
    texts = ["the cat sat", "a dog ran to the mat", "on the mat the dog", "the dog and the cat"] * 2
    one, two = (score_text(each, plain_tokenizer, texts, context_tokens=8) for each in (model, other_model))
    found = paired_difference(one, two)
    assert found.nats == pytest.approx(one.nats_per_token - two.nats_per_token)
    sums = torch.tensor(one.block_nats).double() - torch.tensor(two.block_nats).double()
    assert found.standard_error == pytest.approx(
        ratio_standard_error(sums, torch.tensor(one.block_tokens).double()), rel=1e-4
    )
    same = paired_difference(one, one)
    assert (same.nats, same.standard_error) == (0.0, 0.0)


def test_paired_difference_refuses_different_texts(model, plain_tokenizer):
    one, two = (score_text(model, plain_tokenizer, [text], context_tokens=8) for text in DOCUMENTS[:2])
    with pytest.raises(DataError, match="same text"):
        paired_difference(one, two)


def test_pooled_scores_are_those_of_the_texts_together(model, plain_tokenizer):
    texts = [DOCUMENTS[:2], DOCUMENTS[2:3]]
    pooled = pool_scores([score_text(model, plain_tokenizer, text, context_tokens=5) for text in texts])
    together = score_text(model, plain_tokenizer, DOCUMENTS[:3], context_tokens=5)
    assert (pooled.tokens, pooled.words, pooled.bytes) == (together.tokens, together.words, together.bytes)
    assert pooled.perplexity == pytest.approx(together.perplexity)
    assert pooled.standard_error_nats == pytest.approx(together.standard_error_nats)
    assert pooled.protocol["documents_scored"] == 3
    with pytest.raises(DataError):
        pool_scores([])


def test_a_score_survives_extremes():
    hopeless = TextScore(nats=1e6, tokens=10, words=0, bytes=5, standard_error_nats=None, protocol={})
    assert hopeless.perplexity == math.inf
    assert math.isnan(hopeless.word_perplexity)


@pytest.mark.parametrize("family", ["gpt_neox", "llama", "gpt2"])
def test_zeroed_mixers_add_nothing_and_come_back(family):
    model = build_model(family)
    ids_BT = torch.randint(VOCABULARY, (2, 9))
    with torch.no_grad():
        before = model(input_ids=ids_BT).logits
        with zeroed_mixers(model) as count:
            silent = model(input_ids=ids_BT).logits
            swapped = model(input_ids=ids_BT.flip(1)).logits
        after = model(input_ids=ids_BT).logits
    assert count == 2
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert (silent - before).abs().max() > 1e-3
    if family != "gpt2":
        torch.testing.assert_close(swapped.flip(1), silent, msg="without attention a token sees itself alone")


def test_zeroed_mixers_come_back_after_an_error(model):
    ids_BT = torch.randint(VOCABULARY, (1, 5))
    before = model(input_ids=ids_BT).logits
    with pytest.raises(KeyError), zeroed_mixers(model):
        raise KeyError
    torch.testing.assert_close(model(input_ids=ids_BT).logits, before, rtol=0, atol=0)


def test_zeroed_mixers_silence_a_hybrid_student():
    from limbeck.models.hybrid import build_student

    student = build_student(
        build_model(dtype=torch.float32), mixers=["hyena", "attention"], hyena={"filter": "modal"}
    ).eval()
    ids_BT = torch.randint(VOCABULARY, (1, 7))
    with torch.no_grad(), zeroed_mixers(student) as count:
        silent, swapped = student(input_ids=ids_BT).logits, student(input_ids=ids_BT.flip(1)).logits
    assert count == 2
    torch.testing.assert_close(swapped.flip(1), silent)
