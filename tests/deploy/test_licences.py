"""What licences ask, and what follows for a student."""

import struct

import pytest

from limbeck.core.errors import PublishError
from limbeck.deploy.gguf_words import read_gguf_words
from limbeck.deploy.inheritance import decide_licence
from limbeck.deploy.licences import LICENCES, SERVICES, find_licence, find_service, missing_duties, unlisted_licence
from limbeck.deploy.parents import Parent, front_matter, licences_of, parents_of, read_parent


def parent(*keys, role="teacher and start", name="owner/teacher"):
    return Parent(name, role, tuple(LICENCES[key] for key in keys), "its card")


def decide(*parents, chosen=None, name="tiny"):
    return decide_licence(list(parents), chosen=chosen, model_name=name)


@pytest.mark.parametrize("row", [*LICENCES.values(), *SERVICES.values()], ids=lambda row: row.key)
def test_every_row_names_its_source_and_reads_as_a_sentence(row):
    assert row.source
    assert row.about[0].islower()
    assert not row.about.endswith(".")


def test_the_licences_people_meet_are_known():
    for key in (
        "apache-2.0", "mit", "bsd-3-clause", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0", "openrail", "llama2", "llama3", "llama3.1",
        "llama3.2", "llama3.3", "gemma", "qwen", "qwen-research", "tongyi-qianwen", "mrl", "mnpl", "deepseek",
    ):  # fmt: skip
        assert key in LICENCES
    assert find_licence("Apache 2.0") is LICENCES["apache-2.0"]
    assert find_licence("Tongyi_Qianwen") is LICENCES["tongyi-qianwen"]
    assert find_licence("no-such-licence") is None


@pytest.mark.parametrize("key", ["llama2", "llama3", "tongyi-qianwen"])
def test_a_ban_on_improving_other_models_is_loud_and_stops(key):
    found = decide(parent(key, role="teacher"), name="Llama-3-tiny")
    assert any("FORBIDS distillation" in problem for problem in found.problems)
    assert "no legal advice" in found.warnings[-1]
    with pytest.raises(PublishError, match="--accept-licence"):
        found.refuse(accepted=False)
    found.refuse(accepted=True)


def test_a_student_that_began_as_kin_is_told_to_check():
    assert "may count as derived" in decide(parent("llama2")).problems[0]
    assert "may count as derived" not in decide(parent("llama2", role="teacher")).problems[0]


@pytest.mark.parametrize("key", ["cc-by-nc-4.0", "mrl", "mnpl", "qwen-research"])
def test_purposes_that_are_limited_stop_too(key):
    found = decide(parent(key))
    assert any("LIMITS distillation" in problem for problem in found.problems)
    assert found.licence is LICENCES[key]


@pytest.mark.parametrize(
    "key", ["apache-2.0", "mit", "gemma", "deepseek", "qwen", "cc-by-sa-4.0", "bigscience-openrail-m"]
)
def test_what_allows_it_is_inherited_without_a_stop(key):
    found = decide(parent(key))
    assert found.licence is LICENCES[key]
    assert not found.problems
    found.refuse(accepted=False)


def test_llama_wants_a_name_a_sentence_and_a_notice():
    found = decide(parent("llama3.1"))
    assert any('begins with "Llama"' in problem and "Llama-tiny" in problem for problem in found.problems)
    found = decide(parent("llama3.1"), name="Llama-tiny")
    assert not found.problems
    assert found.shows == ["Built with Llama"]
    assert found.notices[0].startswith("Llama 3.1 is licensed under")
    assert not decide(parent("llama3"), name="Llama-3-tiny").problems[1:]


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("cc-by-nc-4.0", "apache-2.0"), ("gemma", "mit"), ("apache-2.0", "cc0-1.0"), ("cc-by-sa-4.0", "cc-by-4.0"), ("llama3.1", "llama3.3"),
     ("gpl-3.0", "mit"), ("qwen-research", "qwen"), ("apache-2.0", "my-own-words")],
)  # fmt: skip
def test_a_more_permissive_licence_is_refused(teacher, student):
    found = decide(parent(teacher), chosen=student, name="Llama-x")
    assert any("more permissive" in problem for problem in found.problems)
    with pytest.raises(PublishError):
        found.refuse(accepted=False)


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("apache-2.0", "mit"), ("mit", "cc-by-nc-sa-4.0"), ("cc0-1.0", "apache-2.0"), ("gemma", "gemma")],
)
def test_a_licence_that_carries_everything_on_is_taken(teacher, student):
    found = decide(parent(teacher), chosen=student)
    assert not found.problems
    assert found.licence is LICENCES[student]
    assert found.chosen


def test_no_licence_is_more_permissive_than_itself():
    assert all(not missing_duties(row, row) for row in LICENCES.values())


def test_an_unknown_licence_is_asked_for():
    found = decide(Parent("owner/x", "teacher"))
    assert found.licence is None
    with pytest.raises(PublishError, match=r"owner/x.*--licence"):
        found.refuse(accepted=True)
    assert decide(Parent("owner/x", "teacher"), chosen="mit").needs_licence is None
    assert "yours to choose" in decide().needs_licence


def test_of_several_parents_the_licence_that_covers_all_is_inherited():
    assert decide(parent("apache-2.0"), parent("cc-by-nc-4.0")).licence is LICENCES["cc-by-nc-4.0"]
    found = decide(parent("gemma"), parent("llama3.1"), name="Llama-x")
    assert found.licence is None
    assert "none covers the others" in found.needs_licence


@pytest.mark.parametrize(
    ("address", "says"),
    [("https://api.openai.com/v1", "OpenAI"), ("https://api.anthropic.com", "Anthropic"),
     ("https://generativelanguage.googleapis.com/v1beta/openai", "Google"), ("https://myname.openai.azure.com/x", "Azure")],
)  # fmt: skip
def test_services_are_known_by_their_address(address, says):
    row = find_service(address)
    assert row is not None
    assert says in row.title
    found = decide(Parent("model", "teacher", (row,)), chosen="mit")
    assert any("distillation" in problem for problem in found.problems)


@pytest.mark.parametrize(
    "address", ["http://127.0.0.1:8000/v1", "http://localhost:8000", "http://box:8000", "http://[::1]:80"]
)
def test_a_server_of_ones_own_has_no_terms(address):
    assert find_service(address) is None


def test_a_host_that_only_ends_alike_is_another():
    assert find_service("https://notopenai.com/v1").rule == "check"
    assert find_service("https://api.openai.com.evil.example/v1").rule == "check"


def test_the_terms_of_a_service_are_no_licence_for_a_model():
    found = decide(Parent("gpt", "teacher", (SERVICES["openai.com"],)))
    assert "no licence for a model" in found.needs_licence


def test_reading_the_embedded_teacher():
    found = read_parent("embedded", "teacher", fetch=lambda *_: pytest.fail("nothing is asked of the hub"))
    assert found.licences == (LICENCES["apache-2.0"],)
    assert found.languages == ("en",)
    assert found.hub_id is None


def test_reading_a_folder_and_a_hub_card(tmp_path):
    (tmp_path / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mrl\nlicense_link: https://x.example/MRL.md\n---\n# x\n"
    )
    found = read_parent(str(tmp_path), "teacher", fetch=lambda *_: None)
    assert found.licences == (LICENCES["mrl"],)
    assert found.name == tmp_path.name
    hub = read_parent("owner/name", "teacher", revision="abc", fetch=lambda *asked: f"---\nlicense: mit\n---\n{asked}")
    assert (hub.hub_id, hub.licences) == ("owner/name", (LICENCES["mit"],))
    assert read_parent("owner/name", "teacher", fetch=lambda *_: None).licences == ()


@pytest.mark.parametrize(
    "text",
    ["no front matter", "---\n- a list\n---\n", "---\nlicense: [mit\n---\n", "---\nlicense: &a mit\nlanguage: *a\n---\n",
     "---\nlicense: " + "{" * 5000 + "\n---\n",
     "---\nlicense: !!python/object/apply:os.system ['true']\n---\n", "---\nlicense: {mit: 1}\nlanguage: 3\n---\n", "", "\0\0"],
)  # fmt: skip
def test_hostile_front_matter_says_nothing(text):
    assert licences_of(front_matter(text)) == ()


def test_a_licence_of_an_own_name_is_to_be_checked():
    (row,) = licences_of(
        {"license": "other", "license_name": "my <b>licence</b>", "license_link": "javascript:alert(1)"}
    )
    assert row.rule == "check"
    assert row.link is None
    assert unlisted_licence("x").key == "x"


def test_every_kind_of_teacher_and_start():
    cards = {"owner/a": "---\nlicense: mit\n---\n", "owner/b": "---\nlicense: gemma\n---\n"}

    def found(recipe):
        return [
            (one.name, one.role, [row.key for row in one.licences])
            for one in parents_of(recipe, fetch=lambda name, _: cards.get(name))
        ]

    assert found({"teacher": {"source": "owner/a"}}) == [("owner/a", "teacher and start", ["mit"])]
    assert found({"teacher": {"source": "owner/a"}, "student": {"source": "owner/b"}}) == [
        ("owner/a", "teacher", ["mit"]), ("owner/b", "start", ["gemma"]),
    ]  # fmt: skip
    assert found({"teacher": {"source": "owner/a"}, "student": {"size": "bytepool-10m"}}) == [
        ("owner/a", "teacher", ["mit"])
    ]
    assert found({"teacher": {"several": ["owner/a", {"source": "owner/b"}]}}) == [
        ("owner/a", "teacher and start", ["mit"]), ("owner/b", "teacher", ["gemma"]),
    ]  # fmt: skip
    assert found({"teacher": {"served": {"url": "http://127.0.0.1:1/v1", "model": "owner/b"}}}) == [
        ("owner/b", "teacher", ["gemma"])
    ]
    assert found({"teacher": {"closed": {"url": "https://api.openai.com/v1", "model": "m"}}}) == [
        ("m", "teacher", ["terms of OpenAI"])
    ]
    assert found({"teacher": {"store": "/no/such/store"}}) == [("store", "teacher", [])]
    assert found({"teacher": None}) == []
    assert found({"teacher": ["hostile"], "student": 3}) == []


def gguf(*pairs, version=3):
    def text(words):
        raw = words.encode()
        return struct.pack("<Q", len(raw)) + raw

    body = b"".join(text(key) + struct.pack("<I", 8) + text(value) for key, value in pairs)
    return b"GGUF" + struct.pack("<IQQ", version, 0, len(pairs)) + body


def test_the_head_of_a_gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    path.write_bytes(
        gguf(("general.name", "M"), ("general.license", "gemma"), ("llama.x", "y"), ("tokenizer.ggml.model", "gpt2"))
    )
    assert read_gguf_words(path) == {"general.name": "M", "general.license": "gemma"}
    assert read_parent(str(path), "teacher", fetch=lambda *_: None).licences == (LICENCES["gemma"],)


@pytest.mark.parametrize(
    "raw",
    [b"nothing", gguf(("general.name", "M"))[:-1], gguf(version=9), gguf(("a", "b"))[:24] + struct.pack("<Q", 2**62)],
)
def test_a_damaged_gguf_file_is_refused(tmp_path, raw):
    path = tmp_path / "m.gguf"
    path.write_bytes(raw)
    with pytest.raises(PublishError, match=r"m\.gguf"):
        read_gguf_words(path)


def test_words_of_gguf_equal_those_of_its_own_library(tmp_path):
    gguf_library = pytest.importorskip("gguf")
    path = tmp_path / "m.gguf"
    writer = gguf_library.GGUFWriter(path, "llama")
    writer.add_name("M")
    writer.add_license("apache-2.0")
    writer.add_languages(["en", "de"])
    writer.add_block_count(3)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    found = read_gguf_words(path)
    assert (found["general.name"], found["general.license"], found["general.languages"]) == (
        "M",
        "apache-2.0",
        ["en", "de"],
    )
    assert read_parent(str(path), "teacher", fetch=lambda *_: None).languages == ("en", "de")


def test_every_paper_an_objective_names_has_a_title():
    import re

    from limbeck.deploy.citations import TITLES
    from limbeck.objectives.catalogue import OBJECTIVES

    named = {key for entry in OBJECTIVES.values() for key in re.findall(r"\d{4}\.\d{4,5}", entry.source)}
    assert named <= set(TITLES)
