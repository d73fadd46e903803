"""Hostile text, paths and secrets."""

import pytest

from limbeck.deploy.plain import Cleaner, fenced, find_secret, is_local, last_name, local_paths, markdown, printable


@pytest.mark.parametrize(
    "text",
    ["<script>x</script>", "[x](y)", "![x](y)", "**x**", "`x`", "a | b", "# x", "- x", "1. x", "===", "$$x$$", "&lt;", "~~x~~", "<!-- x -->", "\\"],
)  # fmt: skip
def test_markdown_shows_text_and_nothing_else(text):
    from markdown_it import MarkdownIt

    tokens = MarkdownIt("commonmark").enable("table").parse(f"{markdown(text)}\n")
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert all(child.type in ("text", "text_special") for child in tokens[1].children)
    assert "".join(child.content for child in tokens[1].children) == text


@pytest.mark.parametrize("text", ["see https://evil.example/x", "www.evil.example", "ask @someone"])
def test_no_address_becomes_a_link(text):
    assert text not in markdown(text)
    assert markdown(text).replace("\u200b", "") == text


def test_lines_controls_and_length():
    assert markdown("a\n\n# b\r\n---") == "a # b ---"
    assert "\u202e" not in printable("a\u202eb")
    assert "\x1b" not in fenced("a\x1b[2Jb")
    assert len(printable("x" * 10_000, most=100)) == 100
    assert printable("\ud800") == "?"


def test_a_fence_is_longer_than_what_it_holds():
    assert fenced("```\n# out\n```").startswith("````\n")


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [("read /home/ada/secret/novel.txt now", "read novel.txt now"), ("/Users/ada/x.jsonl", "x.jsonl"), (r"C:\Users\ada\x.txt", "x.txt"),
     ("~/texts/notes.md", "notes.md"), ("a/b and 1/2 and https://a.example/b/c", "a/b and 1/2 and https://a.example/b/c"),
     ("owner/model", "owner/model")],
)  # fmt: skip
def test_paths_become_names(text, cleaned):
    assert Cleaner().text(text) == cleaned


def test_known_paths_are_replaced_wherever_they_stand():
    recipe = {
        "data": {"train": [{"source": "my data/of ada.txt"}, "../b/c.jsonl"]},
        "teacher": {"source": "owner/name"},
    }
    paths = local_paths(recipe)
    assert sorted(paths) == ["../b/c.jsonl", "my data/of ada.txt"]
    assert Cleaner(paths).text("my data/of ada.txt (train)") == "of ada.txt (train)"
    assert last_name("~") == "a local folder"


def test_what_is_local(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner").mkdir()
    (tmp_path / "owner" / "name").mkdir()
    assert is_local("owner/name")
    assert not is_local("owner/other")
    assert all(map(is_local, ["x.txt", "/a", "./a", "a/b/c", r"C:\a"]))
    assert not any(map(is_local, ["embedded", "factbook"]))


KEYS = [
    "hf_" + "a" * 30,
    "sk-" + "b" * 40,
    "AKIA" + "C" * 16,
    "ghp_" + "d" * 36,
    "Bearer " + "e" * 30,
    "https://me:word@host.example/x",
]


@pytest.mark.parametrize("key", KEYS)
def test_secrets_are_found_and_removed(key):
    assert "line 2" in find_secret(f"x\n{key}", {})
    assert key not in find_secret(key, {})
    assert find_secret(Cleaner().text(f"say {key} here"), {}) is None


def test_values_of_the_environment_are_secrets_too():
    assert "MY_API_KEY" in find_secret("so it is: plain-words-1", {"MY_API_KEY": "plain-words-1"})
    assert find_secret("so it is: plain-words-1", {"HOME": "plain-words-1", "A_TOKEN": "short"}) is None


def test_words_about_tokens_are_no_secrets():
    words = {
        "first_token": "scored",
        "tokens": "many",
        "api_key": "x",
        "password": "y",
        "api_key_variable": "MY_KEY",
        "token": "z",
    }
    assert Cleaner().value(words) == {
        "first_token": "scored", "tokens": "many", "api_key": "(removed)", "password": "(removed)", "api_key_variable": "MY_KEY",
        "token": "(removed)",
    }  # fmt: skip


def test_addresses_of_ones_own_are_left_out():
    assert Cleaner().value({"url": "http://10.0.0.7:8000/v1"}) == {"url": "(address left out)"}
    assert Cleaner().value({"url": "https://me:key@api.openai.com/v1"}) == {"url": "https://api.openai.com"}
