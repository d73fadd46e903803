"""Before anything is trained: do teacher, student and store understand each other, and what does a teacher cost."""

import math

import pytest
from tests.models.toy_tokenizers import byte_level, word_piece
from tests.store.small_store import make_store
from transformers import AutoConfig, AutoModelForCausalLM

from limbeck import planning, teaching_costs
from limbeck.core.errors import RecipeError, TeacherError
from limbeck.models import costs
from limbeck.models.flops import forward_flops_per_token
from limbeck.models.tokenizers import tokenizer_fingerprint
from limbeck.planning import Machine, PlanError, plan
from limbeck.presets import preset_names
from limbeck.recipe_io import load_recipe, parse_recipe

ROOMY = Machine(device="cpu", memory_bytes=10**12, free_disk_bytes=10**12, matmul_flops_per_second=1e9)
GPU = Machine(device="cuda", memory_bytes=10**12, free_disk_bytes=10**12, matmul_flops_per_second=1e9)
RECIPE = """\
name: trial
teacher: {teacher}
student: {student}
data: {{train: [one.txt], heldout: [one.txt], context_tokens: 16}}
stages: [{{kind: distil, tokens: 1600, batch_tokens: 160, learning_rate: 1e-3}}]
controls: {{from_scratch: false, copied: false, teacher_more: false, floor: false}}
"""
ALM = "stages.0.objectives=[{objective: chunk_likelihood}]"
URL = "url: http://127.0.0.1:9/v1, model: big"


@pytest.fixture(autouse=True)
def text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.txt").write_text("".join(f"{'words of a document ' * 110}\n\n" for _ in range(60)))


@pytest.fixture(autouse=True)
def nothing_is_asked_or_loaded(monkeypatch):
    from limbeck.teachers import endpoint

    def refuse(*args, **kwargs):
        pytest.fail("weights or answers were asked for")

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", refuse)
    monkeypatch.setattr(endpoint.Endpoint, "__init__", refuse)


@pytest.fixture
def model(tmp_path):
    """A function that makes a model's folder without weights: its configuration and, unless None, a tokenizer."""
    made = []

    def make(tokenizer=None, *, rows=400, layers=2, width=16, **changes):
        folder = tmp_path / f"model{len(made)}"
        made.append(folder)
        words = {"vocab_size": rows, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2}
        words |= {"num_key_value_heads": 2, "intermediate_size": 32, "tie_word_embeddings": False}
        AutoConfig.for_model("llama", **words | changes).save_pretrained(folder)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
        return folder

    return make


def look(teacher, student, *overrides, machine=ROOMY):
    student = "{}" if student is None else f"{{source: {student}}}"
    teacher = teacher if str(teacher).startswith("{") else f"{{source: {teacher}}}"
    return plan(parse_recipe(RECIPE.format(teacher=teacher, student=student), overrides), machine=machine)


def test_identical_tokenizers(model):
    found = look(model(byte_level(300)), model(byte_level(300)))
    assert found["tokenizers"]["verdict"] == "identical"
    assert not found["other_tokens"]
    assert found["tokenizer_table"][0] == {"what": "tokens", "student": "300", "teacher": "300", "verdict": "same"}
    assert found["warnings"] == []


def test_vocabularies_that_are_padded_differently(model):
    found = look(model(byte_level(300), rows=320), model(byte_level(300), rows=304))
    assert (found["tokenizers"]["verdict"], found["tokenizers"]["usable_vocabulary"]) == ("padded", 304)


def test_different_tokens_are_refused_with_what_differs_and_the_way_out(model):
    with pytest.raises(
        PlanError, match=r"forward_kl compares(?s:.)*student / teacher\): (?s:.)*chunk_likelihood"
    ) as caught:
        look(model(byte_level(300)), model(byte_level(280)))
    verdicts = {row["verdict"] for row in caught.value.facts["tokenizer_table"]}
    assert "forbids" in verdicts
    assert caught.value.facts["memory"]["total_bytes"] > 0


@pytest.mark.parametrize("objective", ["chunk_likelihood", "sorted_earth_mover"])
def test_different_tokens_with_an_objective_across_them(model, objective):
    change = f"stages.0.objectives=[{{objective: {objective}}}, {{objective: cross_entropy}}]"
    found = look(model(byte_level(300)), model(byte_level(280)), change)
    assert found["other_tokens"]
    assert found["tokenizers"]["verdict"] == "different"


def test_exact_predictions_in_other_tokens(model):
    # 280 tokens of the same text: their merges are the first of the 300's.
    teacher = f"{{source: {model(byte_level(300))}, exact: true}}"
    found = look(teacher, model(byte_level(280)))
    assert found["other_tokens"]
    assert any("one text for every token" in warning for warning in found["warnings"])
    with pytest.raises(PlanError, match=r"predictions alone, not what chunk_likelihood"):
        look(teacher, model(byte_level(280)), ALM)
    with pytest.raises(PlanError, match=r"teacher.exact: .*cannot be had in the student's tokens"):
        look(f"{{source: {model(byte_level(280))}, exact: true}}", model(byte_level(300)))


def test_likelihoods_of_chunks_are_refused_where_tokens_are_the_same(model):
    with pytest.raises(PlanError, match=r"chunk_likelihood is for a teacher with other tokens.*forward_kl"):
        look(model(byte_level(300)), model(byte_level(300)), ALM)


def test_tokenizers_that_hide_their_bytes_cannot_meet(model):
    with pytest.raises(PlanError, match="model1"):
        look(model(byte_level(300)), model(word_piece()), ALM)


def test_a_tokenizer_that_is_not_here_is_a_warning(model):
    found = look(model(byte_level(300)), model())
    assert found["tokenizers"]["verdict"] is None
    assert "could not be looked at" in found["warnings"][0]
    # What cannot be told is not refused: the run itself looks again.
    assert look(model(byte_level(300)), model(), ALM)["tokenizers"]["verdict"] is None


def test_a_tokenizer_larger_than_its_model_is_refused(model):
    with pytest.raises(PlanError, match="ids up to 299, but the model has only 290 rows"):
        look(model(byte_level(300)), model(byte_level(300), rows=290))


def test_chat_templates_that_differ_are_a_warning(model):
    talkative = byte_level(300)
    talkative.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    found = look(model(talkative), model(byte_level(300)))
    assert found["tokenizers"]["verdict"] == "identical"
    assert any("chat templates differ (student: none" in warning for warning in found["warnings"])


def test_a_tokenizer_of_its_own_for_a_new_student(model, tmp_path):
    words = "{architecture: {model_type: llama, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}}"
    text = RECIPE.format(teacher=f"{{source: {model(byte_level(300))}}}", student=words)
    with pytest.raises(PlanError, match="forward_kl"):
        plan(parse_recipe(text, ["tokenizer.train_vocab_size=512"]), machine=ROOMY)
    found = plan(parse_recipe(text, ["tokenizer.train_vocab_size=512", ALM]), machine=ROOMY)
    assert found["student"]["parts"]["embeddings"] == 2 * 512 * 16
    found = plan(parse_recipe(text, [f"tokenizer.source={model(byte_level(290))}", ALM]), machine=ROOMY)
    assert found["student"]["parts"]["embeddings"] == 2 * 290 * 16


def test_several_teachers(model):
    one, other = model(byte_level(300)), model(byte_level(300), width=32)
    found = look(f"{{several: [{one}, {other}]}}", model(byte_level(300)))
    alone = look(one, model(byte_level(300)))
    other_model, _ = planning.build_models(parse_recipe(RECIPE.format(teacher=f"{{source: {other}}}", student="{}")))
    of_other = planning.parameter_count(other_model)
    assert found["memory"]["teacher_bytes"] == alone["memory"]["teacher_bytes"] + 4 * of_other
    assert found["training"][0]["flops"] > alone["training"][0]["flops"]
    with pytest.raises(PlanError, match="tokens of .*cannot be mixed.*one tokenizer"):
        look(f"{{several: [{one}, {model(byte_level(280))}]}}", None)


def test_the_student_as_its_own_teacher(model):
    folder = model(byte_level(300))
    found = look("{itself: {}}", folder)
    size = found["student"]["parameters"]
    assert found["memory"]["teacher_bytes"] == 4 * size
    student = planning.build_models(parse_recipe(RECIPE.format(teacher=f"{{source: {folder}}}", student="{}")))[0]
    # The head runs where a token is predicted: at 15 of the 16 of a row.
    a_token = forward_flops_per_token(student, 16) - 2 * student.get_output_embeddings().weight.numel() / 16
    assert found["training"][0]["flops"] == pytest.approx(1600 * 4 * a_token)
    assert "tokenizers" not in found


def test_a_served_teacher_is_planned_without_being_asked(model):
    teacher = f"{{served: {{{URL}, tokenizer: {model(byte_level(300))}, top_logprobs: 20}}}}"
    with pytest.raises(PlanError, match="forward_kl"):
        look(teacher, model(byte_level(280)))
    found = look(teacher, model(byte_level(280)), ALM)
    assert found["other_tokens"]
    assert found["teacher"] is None
    assert found["store"] == {
        "tokens": 1600, "kept_entries": 20, "store_bytes": round(1600 * (21 * 1.78 + 17)), "answers_bytes": 1600 * 570,
        "in_this_run": True,
    }  # fmt: skip
    assert found["disk"]["store_bytes"] == found["store"]["store_bytes"]
    parts = [value for key, value in found["disk"].items() if key not in ("total_bytes", "free_bytes")]
    assert found["disk"]["total_bytes"] == sum(parts)
    # 200 characters make 50 tokens of prompt, cut to the window of 16, which then holds no more.
    assert found["asking"]["questions_at_least"] == 100
    assert found["asking"]["least_seconds"] is None
    assert "endpoint" in found["time"]["note"]
    student = look(teacher, model(byte_level(280)), ALM, "teacher.served.requests_per_minute=50")
    assert student["asking"]["least_seconds"] == 120


def test_a_served_teacher_with_the_students_tokenizer(model):
    found = look(f"{{served: {{{URL}}}}}", model(byte_level(300)))
    assert not found["other_tokens"]
    assert "tokenizers" not in found


def test_a_closed_teacher_and_what_it_may_cost(model):
    teacher = f"{{closed: {{{URL}, input_price: 2.0, output_price: 8.0, max_new_tokens: 100}}}}"
    tune = "stages=[{kind: tune, tokens: 1600, batch_tokens: 160, learning_rate: 1e-3}]"
    found = look(teacher, model(byte_level(300)), tune)
    assert found["asking"]["questions_at_least"] == 16
    assert found["asking"]["cost_at_most"] == pytest.approx(16 * (16 * 2 + 100 * 8) / 1e6)
    assert found["store"]["in_this_run"]
    assert found["memory"]["teacher_bytes"] == 0


def test_a_live_teacher_is_told_what_a_capture_would_take(model):
    found = look(model(byte_level(300)), model(byte_level(300)), "capture.k=128")
    assert found["store"]["store_bytes"] == round(1600 * (128 * 1.78 + 17))
    assert not found["store"]["in_this_run"]
    assert "store_bytes" not in found["disk"]
    hidden = look(model(byte_level(300)), model(byte_level(300)), "capture.hidden_layers=[1, 2]", "capture.k=128")
    assert hidden["store"]["store_bytes"] - found["store"]["store_bytes"] == 1600 * 2 * 2 * 16


@pytest.mark.parametrize(("k", "values", "measured"), [(32, "uint8", 66.3), (50, "uint8", 99.2), (128, "uint8", 232.8),
                                                       (32, "float16", 83.6), (32, "float32", 135.9)])  # fmt: skip
def test_bytes_of_a_store_are_near_those_measured(k, values, measured):
    found = costs.store_bytes_per_token(k=k, values=values) - costs.ROW_TOKEN_BYTES
    assert math.isclose(found, measured, rel_tol=0.02)


@pytest.fixture
def store(tmp_path):
    """A function that captures a store of 18 rows of 13 tokens, said to be of this tokenizer."""

    def make(tokenizer, **words):
        folder = tmp_path / "store"
        make_store(folder, tokenizer=tokenizer_fingerprint(tokenizer), **words)
        return folder

    return make


LONG = ("data.context_tokens=13", "stages.0.tokens=1300", "stages.0.batch_tokens=13")
SHORT = ("data.context_tokens=13", "stages.0.tokens=130", "stages.0.batch_tokens=13")


def test_a_store_that_fits(model, store):
    folder = store(byte_level(300))
    found = look(f"{{store: {folder}}}", model(byte_level(300)), *SHORT)
    assert not found["other_tokens"]
    [row] = found["stores"]
    assert (row["rows"], row["kind"], row["teacher"]) == (18, "targets", "small")
    assert found["warnings"] == []
    assert found["memory"]["teacher_bytes"] == 0
    assert found["training"][0]["flops"] == pytest.approx(
        look("{itself: {}}", model(byte_level(300)), *SHORT)["training"][0]["flops"] * 3 / 4
    )


def test_a_store_with_too_few_rows_or_of_another_length(model, store):
    folder = store(byte_level(300))
    found = look(f"{{store: {folder}}}", model(byte_level(300)), *LONG)
    assert "has 18 rows, and the stages see 100" in found["warnings"][0]
    named = look(f"{{store: {folder}}}", model(byte_level(300)), *LONG, f"data.train=[{folder}]")
    assert named["warnings"] == []
    with pytest.raises(PlanError, match=r"rows have 13 tokens, and data.context_tokens is 16.*context_tokens=13"):
        look(f"{{store: {folder}}}", model(byte_level(300)))


def test_a_store_in_other_tokens(model, store):
    folder = store(byte_level(300))
    with pytest.raises(PlanError, match=r"(?s)data.train: a student with other tokens.*forward_kl compares"):
        look(f"{{store: {folder}}}", model(byte_level(280)), *SHORT)
    found = look(f"{{store: {folder}}}", model(byte_level(280)), *SHORT, ALM, f"data.train=[{folder}]")
    assert found["other_tokens"]


def test_a_store_that_cannot_be_opened_is_refused(model, store, tmp_path):
    folder = store(byte_level(300))
    with pytest.raises(PlanError, match="not a target store"):
        look(f"{{store: {tmp_path / 'nowhere'}}}", model(byte_level(300)), *SHORT)
    (folder / "progress").mkdir()
    with pytest.raises(PlanError, match="stopped before its end"):
        look(f"{{store: {folder}}}", model(byte_level(300)), *SHORT)
    with pytest.raises(PlanError, match="stopped before its end"):
        look(model(byte_level(300)), model(byte_level(300)), f"data.train=[{folder}]")
    (folder / "progress").rmdir()
    shard = next(folder.glob("shards/*.parquet"))
    shard.write_bytes(shard.read_bytes()[:-9])
    with pytest.raises(PlanError, match=r"parquet"):
        look(f"{{store: {folder}}}", model(byte_level(300)), *SHORT)


def test_layers_that_a_store_or_a_model_does_not_have(model, store):
    folder, student = store(byte_level(300), hidden=(1, 3)), model(byte_level(300))
    objective = "stages.0.objectives=[{{objective: hidden_mse, layers: {}}}]"
    look(f"{{store: {folder}}}", student, *SHORT, objective.format("[[1, 3]]"))
    with pytest.raises(PlanError, match=r"wants the teacher's layers \[2\].*\[1, 3\]"):
        look(f"{{store: {folder}}}", student, *SHORT, objective.format("[[1, 2]]"))
    with pytest.raises(PlanError, match=r"as pairs.*\[1, 3\]"):
        look(f"{{store: {folder}}}", student, *SHORT, "stages.0.objectives=[{objective: hidden_mse}]")
    with pytest.raises(RecipeError, match=r"stages.distil: hidden_mse: .*9"):
        look(model(byte_level(300)), student, objective.format("[[1, 9]]"))


def test_the_model_beside_a_store_goes_by_the_stores_name(model, store):
    folder = store(byte_level(300))
    found = look(f"{{store: {folder}, source: {model(byte_level(300))}}}", model(byte_level(300)), *SHORT)
    assert any("was captured from small" in warning for warning in found["warnings"])


def test_memory_of_teachers_by_hand(model):
    teacher, student = model(byte_level(300), width=32), model(byte_level(300))
    whole = look(teacher, student)["memory"]["teacher_bytes"]
    assert look(teacher, student, "teacher.dtype=bfloat16")["memory"]["teacher_bytes"] == whole / 2
    linear = 2 * (4 * 32 * 32 + 3 * 32 * 32)
    assert look(teacher, student, "teacher.quantise=int8")["memory"]["teacher_bytes"] == whole - 3 * linear
    assert look(teacher, student, "teacher.quantise=int4")["memory"]["teacher_bytes"] == whole - 3.5 * linear
    for change in ("teacher.offload=true", "teacher.device=cuda:1", "teacher.device=cpu"):
        elsewhere = look(teacher, student, change, machine=GPU)
        assert elsewhere["memory"]["teacher_bytes"] == 0
        assert any("the teacher takes" in warning for warning in elsewhere["warnings"])


def test_what_objectives_on_layers_hold(model):
    teacher, student = model(byte_level(300), width=32, layers=3), model(byte_level(300))
    plain = look(teacher, student)["memory"]["targets_bytes"]
    assert plain == 160 * 32 * 4
    hidden = look(teacher, student, "stages.0.objectives=[{objective: hidden_mse}]")["memory"]["targets_bytes"]
    assert hidden - plain == 160 * 3 * 2 * 32 * 4
    maps = look(teacher, student, "stages.0.objectives=[{objective: attention_kl}]")["memory"]["targets_bytes"]
    assert maps - plain == 160 * 4 * 2 * 2 * 16 * 4


def test_further_seeds_and_equal_operations_are_counted(model):
    teacher, student = model(byte_level(300)), model(byte_level(300))
    once = look(teacher, student)
    found = look(teacher, student, "controls.seeds=3", "controls.equal_flops=true")
    assert [row["arm"] for row in found["training"]] == [
        "student", "without_teacher", "equal_flops", "student, seed 1", "without_teacher, seed 1", "student, seed 2",
        "without_teacher, seed 2",
    ]  # fmt: skip
    assert found["training"][2]["flops"] == pytest.approx(once["training"][0]["flops"], rel=0.2)
    assert found["time"]["training_seconds"] > 3 * once["time"]["training_seconds"]
    size = 4 * once["student"]["parameters"]
    assert found["memory"]["weights_bytes"] == once["memory"]["weights_bytes"] + 3 * size


PADDED = {"Qwen/Qwen2.5-7B": 336, "Qwen/Qwen2.5-1.5B": 320, "Qwen/Qwen2.5-0.5B": 320}


@pytest.mark.parametrize("name", [name for name in preset_names() if name not in ("demo", "embedded-teacher")])
def test_every_preset_can_be_planned(name, model, monkeypatch):
    """With tiny configurations in the place of the hub's."""
    folders = {}

    def folder_of(source):
        tokens = 280 if "stablelm" in source else 300
        if source not in folders:
            folders[source] = model(byte_level(tokens), rows=PADDED.get(source, tokens), layers=28, width=32)
        return folders[source]

    read, load = planning.teacher_config, planning.load_tokenizer
    monkeypatch.setattr(planning, "teacher_config", lambda source, **words: read(str(folder_of(source))))
    monkeypatch.setattr("limbeck.preflight.load_tokenizer", lambda source: load(str(folder_of(source))))
    overrides = ["student.shrink.intermediate=16"] if name == "minitron" else []
    found = plan(load_recipe(name, overrides), machine=ROOMY)
    assert found["memory"]["total_bytes"] > 0
    assert found.get("other_tokens", False) == (name in ("llama-70b-stablelm", "byte-trie"))
    if name == "gkd":
        assert found["tokenizers"]["verdict"] == "padded"
        assert "what the student writes" in found["time"]["note"]


def test_a_configuration_that_is_not_here_still_fails(model):
    with pytest.raises(TeacherError, match="nobody/nothing"):
        look("nobody/nothing", model(byte_level(300)))


def test_no_teacher_asks_nothing():
    recipe = load_recipe("embedded-teacher")
    assert teaching_costs.asking(recipe) is None
    assert teaching_costs.written_store(recipe, teachers=[]) is None
    assert teaching_costs.teacher_bytes(recipe, student=None, teachers=[], device="cpu") == (0.0, "")
