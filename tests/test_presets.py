"""The recipes that ship with the package."""

import json

import pytest
from ruamel.yaml import YAML

from limbeck.presets import preset_names, preset_path, preset_summary
from limbeck.recipe_io import dump_recipe, json_schema, load_recipe, parse_recipe

NAMES = preset_names()


def schema_errors(value):
    jsonschema = pytest.importorskip("jsonschema")
    validator = jsonschema.Draft202012Validator
    validator.check_schema(json_schema())
    return [error.message for error in validator(json_schema()).iter_errors(value)]


def outline(schema):
    """Parts, keys and descriptions: what a release of pydantic does not word differently."""
    parts = {"Recipe": schema} | schema["$defs"]
    return {
        name: {key: field.get("description") for key, field in part["properties"].items()}
        for name, part in parts.items()
    }


def read_yaml(text):
    return YAML(typ="safe", pure=True).load(text)


def test_the_promised_presets_are_there():
    assert {"demo", "scavenging-hyena", "smollm2-hyena", "embedded-teacher"} <= set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_a_valid_recipe_under_its_own_name(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert parse_recipe(dump_recipe(recipe)) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_says_what_it_does_needs_and_costs(name):
    lines = preset_path(name).read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# yaml-language-server: $schema=recipe.schema.json"
    comment = lines[1 : next(number for number, line in enumerate(lines) if not line.startswith("#"))]
    assert 3 <= len(comment) <= 6
    assert any("Needs:" in line for line in comment)
    assert any("Costs:" in line for line in comment)
    assert max(map(len, lines)) <= 120
    assert preset_summary(name).endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_the_schema_accepts_a_preset_as_written_and_as_resolved(name):
    assert schema_errors(read_yaml(preset_path(name).read_text(encoding="utf-8"))) == []
    assert schema_errors(load_recipe(name).model_dump(mode="json")) == []


@pytest.mark.parametrize(
    "change", [{"sed": 1}, {"seed": -1}, {"stages": []}, {"data": {}}, {"teacher": 5}, {"controls": {"floor": "yes"}}]
)
def test_the_schema_refuses_what_the_recipe_refuses(change):
    assert schema_errors(load_recipe("demo").model_dump(mode="json") | change)


def test_the_schema_takes_a_bare_string_for_a_source():
    words = load_recipe("demo").model_dump(mode="json")
    words["data"]["train"] = ["some.txt"]
    assert schema_errors(words) == []


def test_the_schema_file_beside_the_presets_is_current():
    shipped = json.loads(preset_path("demo").with_name("recipe.schema.json").read_text(encoding="utf-8"))
    assert outline(shipped) == outline(json_schema()), (
        "write it again: limbeck schema > src/limbeck/presets/recipe.schema.json"
    )


def test_every_key_of_a_recipe_is_described():
    schema = json_schema()
    for part in (schema, *schema["$defs"].values()):
        for key, field in part["properties"].items():
            assert field.get("description"), f"{part['title']}.{key}"


def test_the_scavenging_preset_is_what_the_paper_says():
    recipe = load_recipe("scavenging-hyena")
    assert recipe.teacher.source.endswith("pythia-70m")
    assert recipe.student.keep_attention == 0
    assert (recipe.student.hyena.order, recipe.student.hyena.filter) == (2, "implicit")
    assert [(stage.kind, getattr(stage, "order", None)) for stage in recipe.stages] == [
        ("align", "progressive"), ("distil", None), ("tune", None),
    ]  # fmt: skip
    assert recipe.stages[1].kl > 0
    assert recipe.stages[1].ce > 0
