"""The student: any causal language model of transformers with some attention modules replaced by Hyena operators."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache

from limbeck.core.errors import TeacherError
from limbeck.core.files import write_atomic
from limbeck.models.cache import HyenaCacheLayer, prepare_cache
from limbeck.models.config import HybridConfig, register_config
from limbeck.models.documents import (
    document_positions,
    documents_of_positions,
    packed_attention_mask,
    separate_padding,
)
from limbeck.models.surgery import AttentionSite, find_attention, head_shape
from limbeck.nn.hyena import HyenaOperator

# Under these names the padding mask and the document ids travel through the family's layers to the mixers.
MASK_KEY = "hyena_mask"
DOCUMENTS_KEY = "hyena_document_ids"

_MODELING_FILE = "modeling_limbeck.py"
_MODELING_SOURCE = '''"""Loads this folder by trust_remote_code; after `import limbeck` the flag is not needed."""

from limbeck.models.hybrid import HybridConfig, HybridForCausalLM
'''


class HyenaMixer(nn.Module):
    """A Hyena operator in the place of an attention module: same call, same return value."""

    def __init__(self, operator: HyenaOperator, *, layer_idx: int):
        super().__init__()
        self.operator = operator
        self.layer_idx = layer_idx

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
        """Mix [B, T, D] along T. A cache among the arguments, under whatever name, is continued."""
        mask_BT = kwargs.get(MASK_KEY)
        if mask_BT is not None:
            mask_BT = mask_BT[:, -hidden_states.shape[1] :].to(torch.bool)
        cache = next((value for value in (*args, *kwargs.values()) if isinstance(value, Cache)), None)
        if cache is None:
            return self.operator(hidden_states, mask_BT=mask_BT, document_ids_BT=kwargs.get(DOCUMENTS_KEY)), None
        layer = cache.layers[self.layer_idx]
        assert isinstance(layer, HyenaCacheLayer)
        return layer.advance(self.operator, hidden_states, mask_BT=mask_BT), None


class HybridForCausalLM(PreTrainedModel, GenerationMixin):
    """A causal language model of a known family in which some layers mix with Hyena instead of attention.

    Everything but the replaced modules is the family's own code; with no layer replaced the logits are the family's
    exactly. Works with generate(), save_pretrained and from_pretrained, gradient checkpointing, and PEFT.
    """

    config_class = HybridConfig
    config: HybridConfig
    base_model_prefix = "backbone"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: HybridConfig):
        super().__init__(config)
        self.backbone = AutoModelForCausalLM.from_config(config.backbone)
        self._install_mixers(config)
        self.generation_config = self.backbone.generation_config
        self.post_init()

    def _install_mixers(self, config: HybridConfig) -> None:
        for site in find_attention(self.backbone):
            if config.mixers[site.layer_index] == "hyena":
                setattr(site.parent, site.attribute, _build_mixer(config, site))

    def mixers(self) -> dict[int, HyenaMixer]:
        """The Hyena mixers by layer index."""
        found = [module for module in self.backbone.modules() if isinstance(module, HyenaMixer)]
        return {mixer.layer_idx: mixer for mixer in sorted(found, key=lambda mixer: mixer.layer_idx)}

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Any = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        document_ids: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Logits [B, T, V] in the family's own output class.

        attention_mask: [B, past + T], 0 for padding. document_ids [B, T]: integers that change where a packed document
        ends; documents do not see each other. Positions that restart without a mask and a cache mean the same.
        labels are shifted inside, as everywhere in transformers. use_cache defaults to the config's in evaluation and
        to False in training.

        Raises: ValueError for documents with a cache, or a ready-made 4-D mask where Hyena layers need the 2-D one.
        """
        if use_cache is None:
            use_cache = document_ids is None and not self.training and bool(getattr(self.config, "use_cache", True))
        if document_ids is None and position_ids is not None and attention_mask is None and past_key_values is None:
            document_ids = documents_of_positions(position_ids)
            use_cache = use_cache and document_ids is None
        if document_ids is not None:
            if use_cache or past_key_values is not None:
                raise ValueError(
                    "document_ids and a cache exclude each other: run packed documents with use_cache=False."
                )
            document_ids = separate_padding(document_ids, attention_mask)
            position_ids = document_positions(document_ids)
            attention_mask = packed_attention_mask(self.config.backbone, position_ids, dtype=self.dtype)
            kwargs |= self._mixer_arguments(document_ids=document_ids)
        else:
            kwargs |= self._mixer_arguments(attention_mask=attention_mask)
        if use_cache or past_key_values is not None:
            past_key_values = prepare_cache(past_key_values, self.config)
        return self.backbone(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            labels=labels,
            use_cache=use_cache,
            logits_to_keep=logits_to_keep,
            **kwargs,
        )

    def _mixer_arguments(self, *, attention_mask: Any = None, document_ids: Tensor | None = None) -> dict[str, Tensor]:
        if "hyena" not in self.config.mixers:
            return {}
        if document_ids is not None:
            return {DOCUMENTS_KEY: document_ids}
        if attention_mask is None:
            return {}
        if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
            raise ValueError(
                "attention_mask must have shape [batch, tokens] here: Hyena layers cannot read padding out of a "
                "ready-made mask over pairs of tokens. Pass the 2-D mask, or document_ids for packed documents."
            )
        return {MASK_KEY: attention_mask}

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head."""
        return self.backbone.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the language-model head."""
        self.backbone.set_output_embeddings(new_embeddings)

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs: Any) -> None:  # type: ignore[override]
        """Save as transformers does, with a file that lets it load the folder by trust_remote_code alone."""
        if kwargs.get("is_main_process", True):
            write_atomic(Path(save_directory) / _MODELING_FILE, _MODELING_SOURCE)
        super().save_pretrained(save_directory, **kwargs)


def _build_mixer(config: HybridConfig, site: AttentionSite) -> HyenaMixer:
    options = dict(config.hyena)
    if options.get("inner_width") is None:
        heads, head_dim = head_shape(site)
        options["inner_width"] = heads * head_dim
    mixer = HyenaMixer(HyenaOperator(config.hidden_size, **options), layer_idx=site.layer_index)
    for module in mixer.modules():
        module._is_hf_initialized = True  # type: ignore[assignment]
    return mixer


def build_student(
    teacher_model: PreTrainedModel, *, mixers: Sequence[str], hyena: Mapping[str, Any], copy_weights: bool = True
) -> HybridForCausalLM:
    """A student like the teacher, with the layers marked "hyena" given freshly initialised Hyena mixers.

    mixers: "attention" or "hyena" for each layer. hyena: options of `HyenaOperator`; `inner_width` defaults to the
    replaced attention's heads times head width. copy_weights: take every other weight and buffer from the teacher.
    The student has the teacher's dtype and device, and all its parameters are trainable.

    Raises: TeacherError when the teacher has no replaceable attention, is quantised or a hybrid already, or belongs to
    a family whose layers do not hand extra arguments down to their attention.
    """
    _refuse_teacher(teacher_model)
    find_attention(teacher_model)
    config = HybridConfig(backbone=teacher_model.config, mixers=list(mixers), hyena=dict(hyena))
    student = HybridForCausalLM._from_config(config, dtype=teacher_model.dtype).to(teacher_model.device)
    if copy_weights:
        _copy_weights(teacher_model, student)
    student.generation_config = copy.deepcopy(teacher_model.generation_config)
    student.generation_config.cache_implementation = None
    student.train(teacher_model.training)
    _check_arguments_arrive(student)
    return student


def _refuse_teacher(model: PreTrainedModel) -> None:
    if isinstance(model, HybridForCausalLM):
        raise TeacherError("the teacher is a Limbeck hybrid already; build the student from the original transformer.")
    if getattr(model.config, "quantization_config", None) is not None:
        raise TeacherError(
            f"{type(model).__name__} is quantised, and its weights cannot be trained. Load it unquantised (a GGUF "
            "file is dequantised by limbeck's own loader)."
        )


def _copy_weights(teacher: PreTrainedModel, student: HybridForCausalLM) -> None:
    """Copy every tensor that is not part of a replaced attention, and see that none was left out."""
    replaced = tuple(
        f"{site.name}." for site in find_attention(teacher) if student.config.mixers[site.layer_index] == "hyena"
    )
    theirs = _tensors(teacher)
    ours = {
        name: tensor for name, tensor in _tensors(student.backbone).items() if not name.startswith(replaced or "\0")
    }
    expected = {name for name in theirs if not name.startswith(replaced or "\0")}
    if expected != set(ours):
        raise TeacherError(
            f"{type(teacher).__name__} was not built as its config says: tensors {_some_names(expected ^ set(ours))} "
            "are in one of teacher and student only. Save the teacher with save_pretrained and load it again."
        )
    with torch.no_grad():
        for name, tensor in ours.items():
            if tensor.shape != theirs[name].shape:
                raise TeacherError(
                    f"{type(teacher).__name__} was not built as its config says: {name} has shape "
                    f"{tuple(theirs[name].shape)}, the config gives {tuple(tensor.shape)}."
                )
            tensor.copy_(theirs[name])


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers by name, tied ones under each of their names."""
    return dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))


def _some_names(names: set[str]) -> str:
    return ", ".join(sorted(names)[:4]) + (", ..." if len(names) > 4 else "")


def _check_arguments_arrive(student: HybridForCausalLM) -> None:
    """Run two tokens and see that each mixer was reached by the padding mask."""
    arrived: dict[int, bool] = {}
    handles = [
        mixer.register_forward_pre_hook(
            lambda _module, _args, kwargs, layer=layer: arrived.update({layer: kwargs.get(MASK_KEY) is not None}),
            with_kwargs=True,
        )
        for layer, mixer in student.mixers().items()
    ]
    try:
        ids = torch.zeros((1, 2), dtype=torch.long, device=student.device)
        with torch.no_grad():
            student(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    deaf = sorted(layer for layer in student.mixers() if not arrived.get(layer))
    if deaf:
        raise TeacherError(
            f"{type(student.backbone).__name__} does not hand extra arguments down to its attention (layers "
            f"{deaf[:8]}), so padding and packed documents could not be respected. Choose a teacher of another family."
        )


def register_model() -> None:
    """Make `AutoModelForCausalLM` know the student. Safe to call again."""
    register_config()
    AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM, exist_ok=True)


__all__ = ["HybridConfig", "HybridForCausalLM", "HyenaMixer", "build_student", "register_model"]


register_model()
