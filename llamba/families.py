"""The families of models whose decoder layers have the form of Llama's, and what each has beside that. Layers of these
are kept whole in hybrids, and students are built of these models.
"""

from typing import Any, NamedTuple, TypeAlias

from torch import nn
from transformers import LlamaConfig, MistralConfig, PretrainedConfig, PreTrainedModel, Qwen2Config, Qwen3Config
from transformers.models.llama import modeling_llama
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaDecoderLayer
from transformers.models.mistral import modeling_mistral
from transformers.models.mistral.modeling_mistral import MistralAttention, MistralDecoderLayer
from transformers.models.qwen2 import modeling_qwen2
from transformers.models.qwen2.modeling_qwen2 import Qwen2Attention, Qwen2DecoderLayer
from transformers.models.qwen3 import modeling_qwen3
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention, Qwen3DecoderLayer

TeacherConfig: TypeAlias = LlamaConfig | MistralConfig | Qwen2Config | Qwen3Config
DecoderLayer: TypeAlias = LlamaDecoderLayer | MistralDecoderLayer | Qwen2DecoderLayer | Qwen3DecoderLayer
Attention: TypeAlias = LlamaAttention | MistralAttention | Qwen2Attention | Qwen3Attention

# The fields of a config that decide what a decoder layer of any family computes.
COMMON = (
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
    "attention_dropout",
)


class Family(NamedTuple):
    """Holds transformers' classes of one family, and how its layers differ from the others'."""

    title: str
    config: type[TeacherConfig]
    model: type[PreTrainedModel]
    layer: type[DecoderLayer]
    attention: type[Attention]
    mlp: type[nn.Module]
    norm: type[nn.Module]
    fields: tuple[str, ...] = COMMON  # of its config; with `attention_bias` it may give o_proj a bias, too
    fixed: tuple[tuple[str, Any], ...] = ()  # values whose default is another model
    normed_heads: bool = False  # whether q and k of each head pass through a norm before they are rotated


PARTS = ("Config", "ForCausalLM", "DecoderLayer", "Attention", "MLP", "RMSNorm")


def _family(title: str, module: Any, **more: Any) -> Family:
    """Takes the classes of a family by the names that they have in transformers."""
    return Family(title, *(getattr(module, title + part) for part in PARTS), **more)


FAMILIES = {
    "llama": _family("Llama", modeling_llama, fields=(*COMMON, "attention_bias", "mlp_bias")),
    "mistral": _family("Mistral", modeling_mistral, fixed=(("sliding_window", None),)),
    "qwen2": _family("Qwen2", modeling_qwen2),  # q, k and v always have biases, o_proj never
    "qwen3": _family("Qwen3", modeling_qwen3, fields=(*COMMON, "attention_bias"), normed_heads=True),
}
ATTENTIONS = tuple(family.attention for family in FAMILIES.values())
KNOWN = "expected 'llama', 'mistral', 'qwen2' or 'qwen3'"


def other_form(config: PretrainedConfig) -> str | None:
    """Returns in a few words why a model's layers have not the form of Llama's; None if they have it."""
    if config.model_type not in FAMILIES:
        return f"model_type {config.model_type!r}; {KNOWN}"
    kinds = set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - {"full_attention"}):
        return f"layer_types with {others[0]!r}; expected 'full_attention' alone"
    window = getattr(config, "sliding_window", None)
    if window is not None and not kinds:  # where the kinds are listed, no layer uses it
        return f"sliding_window {window!r}, by which attention sees the last tokens only; expected none"
    return None


def width_of_heads(config: TeacherConfig) -> int:
    """Returns the channels of an attention head, which the config of a Qwen2 need not say."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def attention_cfg_from(teacher: TeacherConfig) -> dict[str, Any]:
    """Returns the part of a teacher's config that its layers need in a hybrid, with its family as `model_type`."""
    fields = FAMILIES[teacher.model_type].fields
    values = {name: getattr(teacher, name) for name in fields if name != "head_dim"}
    return {"model_type": teacher.model_type, **values, "head_dim": width_of_heads(teacher)}


def config_of(attention_cfg: dict[str, Any], **more: Any) -> TeacherConfig:
    """Returns the config that `attention_cfg` was taken from. more: what does not matter to a layer alone."""
    values = dict(attention_cfg)
    family = FAMILIES[values.pop("model_type", "llama")]  # hybrids of before there were families name none
    return family.config(**values, **dict(family.fixed), **more)
