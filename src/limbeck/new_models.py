"""Students of a size or an architecture of their own: from the words of a recipe to a configuration and a new model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError

from limbeck.core.errors import RecipeError, unknown_name
from limbeck.core.runtime import seed_everything
from limbeck.core.symbols import EOP, PAD
from limbeck.data.order import Mixture
from limbeck.nn.byte_pool_settings import BytePoolSettings
from limbeck.nn.trunk_settings import TrunkSettings
from limbeck.recipe import Recipe
from limbeck.recipe_agreement import BYTE_POOL, OWN_FAMILIES


def scratch_config(recipe: Recipe, **options: Any) -> Any:
    """The configuration of a new student, as transformers has it. options: keys that the recipe's own come before.

    Raises: RecipeError when a key is unknown, or the values cannot be.
    """
    from transformers import AutoConfig

    words = recipe.student.configuration
    family = words.pop("model_type")
    if family == BYTE_POOL:
        wanted = words.setdefault("patch_bytes", recipe.patch_bytes)
        if wanted != recipe.patch_bytes:
            raise RecipeError(
                f"student.architecture.patch_bytes is {wanted}, and tokenizer.patch_bytes {recipe.patch_bytes}: patches are cut "
                "by the one and read by the other. Leave the second out."
            )
        options.pop("vocab_size", None)
    try:
        refuse_unknown_keys(family, words)
        refuse_wrong_types(family, words)
        return AutoConfig.for_model(family, **options | words)
    except (ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"student.architecture: {error}") from error


def refuse_unknown_keys(family: str, words: Mapping[str, Any]) -> None:
    """Keys that Limbeck's own families do not have: transformers would keep them and nobody would read them.

    Raises: ValueError with the nearest key.
    """
    from transformers import CONFIG_MAPPING

    if family not in OWN_FAMILIES:
        return
    known = {field.name for field in fields(CONFIG_MAPPING[family])}
    for key in words:
        if key not in known:
            raise ValueError(unknown_name("key", key, known))


def refuse_wrong_types(family: str, words: Mapping[str, Any]) -> None:
    """Values of another type than the settings of Limbeck's own families have: text for a number, half a layer.

    Raises: RecipeError with the key.
    """
    if family not in OWN_FAMILIES:
        return
    trunk = words.get("trunk") or {}
    if not isinstance(trunk, Mapping):
        raise RecipeError(f"student.architecture.trunk: expected a mapping (key: value), got {trunk!r}.")
    _check_types(TrunkSettings, trunk, "student.architecture.trunk")
    if family == BYTE_POOL:
        _check_types(BytePoolSettings, {k: v for k, v in words.items() if k != "trunk"}, "student.architecture")


def _check_types(settings: type, words: Mapping[str, Any], where: str) -> None:
    for name, hint in get_type_hints(settings).items():
        if name not in words:
            continue
        value = tuple(words[name]) if isinstance(words[name], list) else words[name]
        try:
            TypeAdapter(hint).validate_python(value, strict=True)
        except ValidationError as error:
            kinds = (get_origin(hint), hint, *get_args(hint))
            expected = next((text for kind, text in _KINDS.items() if kind in kinds), "a list")
            raise RecipeError(f"{where}.{name}: expected {expected}, got {words[name]!r}.") from error


_KINDS = {
    Mapping: "a mapping (key: value)",
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a name",
}


def scratch_model(recipe: Recipe, tokenizer: Any, data: Mixture, *, seed: int) -> Any:
    """A new model of `student.size` or `architecture`, randomly initialised.

    data: where a model of bytes sees how long patches are, which its count of operations needs.
    """
    from transformers import AutoModelForCausalLM

    end = tokenizer.eos_token_id
    specials = {
        "bos_token_id": end if tokenizer.bos_token_id is None else tokenizer.bos_token_id, "eos_token_id": end,
        "pad_token_id": end if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    }  # fmt: skip
    if recipe.student.configuration.get("model_type") == BYTE_POOL:
        specials["mean_patch_bytes"] = mean_patch_bytes(data)
    config = scratch_config(recipe, vocab_size=len(tokenizer), **specials)
    rows = config.get_text_config().vocab_size
    if rows < len(tokenizer):
        raise RecipeError(
            f"student: the model has {rows} rows for tokens, and the tokenizer has {len(tokenizer)} tokens. Set "
            f"tokenizer.train_vocab_size: {rows}, or student.architecture: {{vocab_size: {len(tokenizer)}}}."
        )
    try:
        seed_everything(seed)
        return AutoModelForCausalLM.from_config(config)
    except (ValueError, TypeError, KeyError) as error:
        raise RecipeError(f"student.architecture: {error}") from error


def mean_patch_bytes(data: Mixture, *, rows: int = 16) -> float:
    """Bytes of a patch on average, in the first rows of the data."""
    ids_BT = data.batch(0, min(rows, data.windows)).input_ids_BT
    return round(float((ids_BT < PAD).sum()) / max(1, int((ids_BT == EOP).sum())), 3)
