"""Operations of every kind of lesson: what is counted while it runs against torch's own count of matrix products."""

from dataclasses import replace

import pytest
import torch
from tests.models.families import VOCABULARY, tiny_teacher, token_ids
from tests.models.toy_tokenizers import byte_level_of_merges
from tests.teachers import trie_pairs
from tests.teachers.trie_pairs import DOCUMENTS, PATCH_BYTES, symbol_rows
from tests.train.products import Products, as_torch_counts
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck.core.types import Batch
from limbeck.models.byte_pool import BytePoolConfig, BytePoolForCausalLM
from limbeck.models.compact import CompactConfig, CompactForCausalLM
from limbeck.models.flops import forward_flops_per_token
from limbeck.models.hybrid import build_student
from limbeck.models.layer_maps import layer_map
from limbeck.models.metering import FlopMeter
from limbeck.models.projections import FeatureProjections
from limbeck.models.surgery import find_attention
from limbeck.nn.flops import attended_tokens, hyena_flops
from limbeck.teachers.crossed import CrossTokenizerTeacher
from limbeck.teachers.entries import Sampled, TopK
from limbeck.teachers.exact import ExactTeacher
from limbeck.teachers.live import LiveTeacher
from limbeck.teachers.own import EmaTeacher
from limbeck.teachers.several import SeveralTeachers
from limbeck.teachers.trie import TrieTeacher
from limbeck.train.distil import DistilLesson, Term
from limbeck.train.on_policy import AdaptiveLesson, MiniLLMLesson, OnPolicyLesson
from limbeck.train.rollouts import Writing
from limbeck.train.stages import AlignLesson
from limbeck.train.trie import TrieLesson

WIDTH = 12
HYENA = {"filter": "explicit", "filter_options": {"filter_length": 8}}  # its taps are no matrix product
TEXT, KL, REVERSE = Term("cross_entropy"), Term("forward_kl"), Term("reverse_kl")


def model(layers=2, family="gpt2"):
    # GPT-2 turns nothing: the angles of rotary positions are matrix products too, and not counted.
    one = tiny_teacher(family, layers=layers)
    one.set_attn_implementation("eager")
    return one


def hybrid(mixers=("hyena", "attention")):
    student = build_student(model(), mixers=list(mixers), hyena=HYENA)
    student.set_attn_implementation("eager")
    return student


def text(rows=4, width=WIDTH):
    ids = token_ids(rows, width, seed=0)
    mask = torch.ones_like(ids, dtype=torch.bool)
    mask[:, 0] = False
    return Batch(ids, mask)


def counted(lesson, batch):
    """What a meter counts of a lesson on a batch forth and back, and what torch counts."""
    meter = FlopMeter(lesson.networks())
    lesson.student.train()
    torch.manual_seed(0)
    with Products() as products, sdpa_kernel(SDPBackend.MATH):
        loss, _ = lesson(lesson.prepare(batch))
        loss.backward()
    meter.close()
    return meter.flops, products.total


def features(student):
    pairs = tuple(layer_map([[1, 1]], 2, 2))
    projections = FeatureProjections(pairs, student_width=32, teacher_width=32, always=True)
    return DistilLesson(student, LiveTeacher(model()), [Term("hidden_mse", pairs=pairs)], projections=projections)


def only_mixers(student):
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("operator" in name)
    return DistilLesson(student, LiveTeacher(model()), [KL])


def checkpointed(student):
    student.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return DistilLesson(student, LiveTeacher(model()), [KL, TEXT])


def several(student):
    return DistilLesson(student, SeveralTeachers([LiveTeacher(model()), LiveTeacher(model(1))]), [KL])


def aligned(student, inputs):
    teacher, mixers = model(), student.mixers()
    sites = {site.layer_index: site.module for site in find_attention(teacher)}
    for name, parameter in student.named_parameters():
        parameter.requires_grad_("operator" in name)
    return AlignLesson(
        student, teacher, student_mixers=mixers, teacher_mixers={layer: sites[layer] for layer in mixers},
        operators={layer: mixer.operator for layer, mixer in mixers.items()}, power=dict.fromkeys(mixers, 1.0),
        layers=list(mixers), inputs=inputs,
    )  # fmt: skip


def written(student, **words):
    return Writing(prompt_tokens=4, **words)


LESSONS = {
    "text": lambda: DistilLesson(model(), None, [TEXT]),
    "hybrid": lambda: DistilLesson(hybrid(), None, [TEXT]),
    "dense": lambda: DistilLesson(model(), LiveTeacher(model(3)), [KL, TEXT]),
    "top_k": lambda: DistilLesson(model(), LiveTeacher(model(), entries=TopK(4)), [KL]),
    "sampled": lambda: DistilLesson(model(), LiveTeacher(model(), entries=Sampled(5, seed=1)), [KL]),
    "itself": lambda: DistilLesson(student := model(), EmaTeacher(student, decay=0.9), [KL]),
    "several": lambda: several(model()),
    "features": lambda: features(model()),
    "mixers alone": lambda: only_mixers(hybrid(("attention", "hyena"))),
    "checkpointed": lambda: checkpointed(hybrid()),
    "align, teacher's inputs": lambda: aligned(hybrid(), "teacher"),
    "align, student's inputs": lambda: aligned(hybrid(), "student"),
    "mixed": lambda: OnPolicyLesson(model(), LiveTeacher(model()), [KL, TEXT], writing=written(0), share=0.5),
    "ended": lambda: OnPolicyLesson(
        hybrid(), LiveTeacher(model()), [KL], writing=written(0, end_token=5, rows_at_a_time=3), share=1.0
    ),
    "minillm": lambda: MiniLLMLesson(model(), LiveTeacher(model(3)), [REVERSE, TEXT], writing=written(0)),
    "adaptive": lambda: AdaptiveLesson(
        model(), LiveTeacher(model()), [KL, TEXT], writing=written(0), heldout=text(), first_share=0.7
    ),
}  # fmt: skip


def of_bytes(teacher="trie", **options):
    tokenizer = trie_pairs.nested()
    theirs, ours = trie_pairs.make_teacher(tokenizer), trie_pairs.byte_tokenizer(tokenizer)
    theirs.set_attn_implementation("eager")
    torch.manual_seed(5)
    trunk = {"width": 16, "layers": 2, "heads": 2, "kv_heads": 1, "feed_forward": 24, **options.pop("trunk", {})}
    student = BytePoolForCausalLM(
        BytePoolConfig(trunk=trunk, patch_bytes=PATCH_BYTES, local_width=8, encoder_layers=1, decoder_layers=1, local_heads=2, **options)
    ).double()  # fmt: skip
    if teacher == "paths":
        source = TrieTeacher(theirs, tokenizer, ours, paths=4)
        return TrieLesson(student, source, [Term("byte_trie"), TEXT]), ours
    if teacher == "aligned":
        source = CrossTokenizerTeacher(theirs, tokenizer, ours)
        return DistilLesson(student, source, [Term("chunk_likelihood"), TEXT], crosses_tokenizers=True), ours
    source = TrieTeacher(theirs, tokenizer, ours) if teacher == "trie" else None
    return DistilLesson(student, source, [KL if source else TEXT]), ours


BYTES = {
    "bytes alone": {"teacher": None},
    "trie": {},
    "paths": {"teacher": "paths"},
    "aligned": {"teacher": "aligned"},
    "looped": {"trunk": {"layers": 2, "loop": [0, 1, 2]}},
}


@pytest.mark.parametrize("name", BYTES)
def test_bytes_in_patches(name, monkeypatch):
    as_torch_counts(monkeypatch)
    lesson, tokenizer = of_bytes(**BYTES[name])
    ours, torchs = counted(lesson, symbol_rows(tokenizer, DOCUMENTS, 24, packed=False))
    # The angles of the teacher's rotary positions are products that are not counted.
    assert ours == pytest.approx(torchs, rel=0.02)


def test_the_exact_route_reads_a_context_for_every_token(monkeypatch):
    as_torch_counts(monkeypatch)
    merges = [("a", "b"), ("ab", "c"), ("a", "a"), ("b", "c"), ("ab", "ab")]
    student_tokens, teacher_tokens = byte_level_of_merges(merges[:1]), byte_level_of_merges(merges)
    config = AutoConfig.for_model(
        "gpt2", vocab_size=len(teacher_tokens), n_embd=16, n_layer=2, n_head=2, n_positions=64
    )
    teacher = AutoModelForCausalLM.from_config(config)
    config.vocab_size = len(student_tokens)
    student = AutoModelForCausalLM.from_config(config)
    for one in (student, teacher):
        one.set_attn_implementation("eager")
    source = ExactTeacher(teacher, teacher_tokens, student_tokens, vocabulary_size=len(student_tokens))
    ids = torch.tensor([student_tokens("abc aab abab bc abc aabc abab")["input_ids"][:16]])
    batch = Batch(ids, torch.ones_like(ids, dtype=torch.bool))
    lesson = DistilLesson(student, source, [KL])
    ours, torchs = counted(lesson, batch)
    assert ours == pytest.approx(torchs, rel=1e-3)
    alone, _ = counted(DistilLesson(student, None, [TEXT]), batch)
    assert ours > 1.8 * alone  # one pass of a teacher of the student's size would be a third


@pytest.mark.parametrize("loops", [1, 3])
def test_blocks_that_run_several_times_count_each_time(loops, monkeypatch):
    as_torch_counts(monkeypatch)
    config = CompactConfig(
        vocab_size=VOCABULARY, trunk={"width": 16, "layers": 2, "heads": 2, "feed_forward": 24, "loop": [0, 1, loops]}
    )
    student = CompactForCausalLM(config)
    ours, torchs = counted(DistilLesson(student, None, [TEXT]), text())
    assert ours == pytest.approx(torchs, rel=1e-3)


# What torch does not count: the half of attention, transforms


def test_attention_counts_what_a_token_may_see():
    student = model()
    meter = FlopMeter([student])
    with torch.no_grad():
        student(input_ids=token_ids(3, WIDTH, seed=0), use_cache=False)
    meter.close()
    matrices = sum(
        2 * module.weight.numel()
        for _, module in student.named_modules()
        if type(module).__name__ in ("Conv1D", "Linear")
    )
    assert meter.flops == 3 * WIDTH * matrices + 2 * 3 * 4 * 32 * sum(range(1, WIDTH + 1))


def test_reading_on_from_a_cache_costs_what_the_whole_costs():
    student = hybrid().eval()
    ids = token_ids(2, WIDTH, seed=0)
    counts = []
    for cuts in ((WIDTH,), (5, 4, 1, 1, 1)):
        meter = FlopMeter([student])
        cache = None
        with torch.no_grad():
            for part in ids.split(cuts, dim=1):
                cache = student(input_ids=part, past_key_values=cache, use_cache=True).past_key_values
        meter.close()
        counts.append(meter.flops)
    assert counts[0] == pytest.approx(counts[1], abs=len((5, 4, 1, 1, 1)))


def test_windows_and_pasts_by_hand():
    assert attended_tokens(3, 2) == 4 + 5
    assert attended_tokens(3, 4, window=5) == 4 + 5 + 5 + 5
    whole = hyena_flops(10, order=2, short_conv=3, past=0, new=8)
    assert whole == 8 * 10 * (48 + 2 + 18)
    parts = [hyena_flops(10, order=2, short_conv=3, past=past, new=1) for past in range(8)]
    assert sum(parts) == pytest.approx(whole)


def test_a_mixer_forth_and_back_by_hand():
    lesson = aligned(hybrid(), "teacher")
    meter = FlopMeter([lesson.student.mixers()[0].operator])
    lesson(text())[0].backward()
    meter.close()
    into, out, mixing = 2 * 32 * 96, 2 * 32 * 32, hyena_flops(32, order=2, short_conv=3, past=0, new=WIDTH) / WIDTH
    # Its input needs no gradient, so the first projection has one product less.
    assert meter.flops == pytest.approx(4 * WIDTH * (2 * into + 3 * out + 3 * mixing))


def test_a_pause_and_a_closed_meter_count_nothing():
    student = model()
    meter = FlopMeter([student])
    ids = token_ids(2, WIDTH, seed=0)
    with meter.paused():
        student(input_ids=ids).logits.sum().backward()
    assert meter.flops == 0
    student(input_ids=ids)
    seen = meter.flops
    meter.close()
    student(input_ids=ids)
    assert meter.flops == seen > 0


def test_several_teachers_count_only_where_they_are_asked():
    lesson = DistilLesson(model(), LiveTeacher(model()), [KL, TEXT])
    whole, _ = counted(lesson, text())
    routed = SeveralTeachers(
        [LiveTeacher(model()), LiveTeacher(model())],
        weights=lambda batch: torch.tensor([[1.0, 0.0]] * len(batch.input_ids_BT)),
    )
    ours, _ = counted(DistilLesson(model(), routed, [KL, TEXT]), replace(text(), sources=(0,) * 4))
    assert ours == whole


SLOW = {"mixed", "minillm", "adaptive", "sampled", "itself", "several", "top_k"}


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in SLOW)) for name in LESSONS])
def test_matrix_products_are_those_that_torch_counts(name, monkeypatch):
    as_torch_counts(monkeypatch)
    ours, torchs = counted(LESSONS[name](), text())
    assert ours > 0
    # Where positions are made anew a few rows are more; all that learns and teaches is in.
    assert ours == pytest.approx(torchs, rel=1e-3)


MIXTURE = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "num_local_experts": 4, "vocab_size": VOCABULARY, "eos_token_id": None, "pad_token_id": None, "head_dim": 8,
}  # fmt: skip
ROUTERS = 2 * 2 * 32 * 4  # of two layers


def mixture(family, chosen=2, **options):
    words = MIXTURE | {"num_experts_per_tok": chosen, "tie_word_embeddings": False}
    config = AutoConfig.for_model(family, **words)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32, **options)


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_a_mixture_counts_the_experts_that_tokens_go_through(family, monkeypatch):
    as_torch_counts(monkeypatch)
    student = mixture(family, experts_implementation="eager")
    ours, torchs = counted(DistilLesson(student, None, [TEXT]), text())
    assert ours == pytest.approx(torchs - 3 * ROUTERS * 4 * WIDTH, rel=2e-3)  # angles of positions are not counted
    # One expert more is three matrices more in each layer, foretold and counted, in whatever way experts are run.
    more = forward_flops_per_token(mixture(family, 3), WIDTH) - forward_flops_per_token(student, WIDTH)
    assert more == 2 * 2 * 3 * 32 * 48
    monkeypatch.undo()
    meter = FlopMeter([other := mixture(family, 3)])
    other(input_ids=(ids := text().input_ids_BT)).logits.sum().backward()
    meter.close()
    assert meter.flops == 3 * ids.numel() * forward_flops_per_token(other, WIDTH)


def test_a_router_that_gives_two_tensors_stops_no_training():
    student = mixture("llama4_text", 1)
    meter = FlopMeter([student])
    student(input_ids=text().input_ids_BT).logits.sum().backward()
    meter.close()
    assert meter.flops > 0


def test_a_matrix_may_be_given_its_input_by_name():
    matrix = torch.nn.Linear(3, 5)
    meter = FlopMeter([matrix])
    matrix(input=torch.ones(2, 3)).sum().backward()
    meter.close()
    assert meter.flops == 2 * 2 * (2 * 3 * 5)
