import copy
import json

import pytest
from tests.models.families import FAMILIES, tiny_teacher
from transformers import AutoConfig, LlamaConfig

from limbeck.core.errors import TeacherError
from limbeck.models.config import HybridConfig, register_config


def family_config(**options: object) -> LlamaConfig:
    sizes = {
        "vocab_size": 64,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    return LlamaConfig(**(sizes | options))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_config_survives_its_folder(family, tmp_path):
    config = HybridConfig(backbone=tiny_teacher(family).config, mixers=["hyena", "attention"], hyena={"order": 3})
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, HybridConfig)
    assert type(loaded.backbone) is type(config.backbone)
    assert loaded.backbone.to_dict() == config.backbone.to_dict()
    assert (loaded.mixers, loaded.hyena) == (["hyena", "attention"], {"order": 3})
    assert loaded.layer_types == config.layer_types
    assert loaded.layer_types[0] == "hyena"
    kinds = getattr(config.backbone, "layer_types", None)
    is_sliding = (
        (kinds[1] == "sliding_attention") if kinds else getattr(config.backbone, "sliding_window", None) is not None
    )
    assert loaded.layer_types[1] == ("sliding_attention" if is_sliding else "full_attention")


def test_the_familys_attributes_are_found():
    config = HybridConfig(backbone=tiny_teacher("gpt2").config, mixers=["hyena", "hyena"])
    assert (config.hidden_size, config.n_embd, config.num_hidden_layers) == (32, 32, 2)
    assert (config.vocab_size, config.max_position_embeddings, config.eos_token_id) == (96, 128, 2)
    assert config.tie_word_embeddings
    assert not hasattr(config, "no_such_thing")


def test_setting_a_familys_attribute_reaches_the_backbone(tmp_path):
    config = HybridConfig(backbone=family_config(), mixers=["hyena", "attention"])
    config.use_cache = False
    config.vocab_size = 70
    config.mixers = ["hyena", "hyena"]
    assert (config.backbone.use_cache, config.backbone.vocab_size) == (False, 70)
    config.save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).vocab_size == 70
    assert "vocab_size" not in json.loads((tmp_path / "config.json").read_text())


def test_the_teachers_config_is_copied_and_its_path_left_out(tmp_path):
    original = family_config()
    original.name_or_path = "/home/someone/secret"
    config = HybridConfig(backbone=original, mixers=["hyena", "attention"])
    config.vocab_size = 70
    assert original.vocab_size == 64
    config.save_pretrained(tmp_path)
    assert "secret" not in (tmp_path / "config.json").read_text()


def test_copies_are_equal_and_apart():
    config = HybridConfig(backbone=family_config(), mixers=["hyena", "attention"])
    twin = copy.deepcopy(config)
    assert twin.to_dict() == config.to_dict()
    twin.vocab_size = 65
    assert config.vocab_size == 64


def test_mixers_default_to_attention_and_are_checked():
    assert HybridConfig(backbone=family_config()).mixers == ["attention", "attention"]
    with pytest.raises(TeacherError, match="3 are given but the model has 2"):
        HybridConfig(backbone=family_config(), mixers=["hyena"] * 3)
    with pytest.raises(TeacherError, match="unknown kind mamba"):
        HybridConfig(backbone=family_config(), mixers=["hyena", "mamba"])


def test_an_unknown_backbone_is_named():
    with pytest.raises(TeacherError, match="'no_such_family'"):
        HybridConfig(backbone={"model_type": "no_such_family"}, mixers=[])


def test_registering_twice_is_harmless():
    register_config()
    register_config()
    assert isinstance(AutoConfig.for_model("limbeck_hybrid", backbone=family_config()), HybridConfig)
