"""The config of a Llama, read from what a GGUF file says of it. What the file does not say in so many words, such as
the rotary scaling of Llama 3, is found in its tensors; what no Llama has is an error.
"""

import math
from typing import Any

import numpy as np
from transformers import LlamaConfig

PLAIN = {"F32": ("F32", np.float32), "F16": ("F16", np.float16), "BF16": ("BF16", np.uint16)}  # as safetensors has them
ROPE_FACTORS = "rope_freqs.weight"  # goes into the config
CONTEXT_OF_LLAMA_3 = 8192  # tokens; its published configs stretch the rotary embedding from there


def shape_of(tensor: Any) -> list[int]:
    """Returns the shape of a file's tensor as torch has it; GGUF lists the innermost dimension first."""
    return [int(size) for size in reversed(tensor.shape)]


def stored_as(tensor: Any) -> tuple[str, type]:
    """Returns safetensors' name of the dtype in which a tensor is written, and NumPy's type of that size."""
    return PLAIN.get(tensor.tensor_type.name, PLAIN["F32"])


def config_of(values: dict[str, Any], tensors: dict[str, Any]) -> LlamaConfig:
    """Returns the config that a file's values and tensors describe. Raises ValueError for what a Llama is not."""
    architecture = values.get("general.architecture")
    if architecture != "llama":
        raise ValueError(f"its architecture is {architecture!r}; expected 'llama'")
    if values.get("llama.expert_count"):
        raise ValueError(f"it has {values['llama.expert_count']} experts per layer")
    if values.get("llama.attention.sliding_window"):
        raise ValueError(f"its attention sees a window of {values['llama.attention.sliding_window']} tokens only")

    def size(key: str, default: int | None = None) -> int:
        value = values.get(f"llama.{key}", default)
        if type(value) is not int or value < 1:  # a list has one value per layer, which no Llama has
            raise ValueError(f"llama.{key} is {str(value):.60}; expected a whole number")
        return value

    heads, width = size("attention.head_count"), size("embedding_length")
    head_dim = size("attention.key_length", width // heads)
    if size("attention.value_length", head_dim) != head_dim or size("rope.dimension_count", head_dim) != head_dim:
        raise ValueError("its keys, values and rotary embedding differ in width")
    token = {name: values.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos", "padding", "eot")}
    ends = [index for index in dict.fromkeys((token["eos"], token["eot"])) if index is not None]
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=shape_of(_needed(tensors, "token_embd.weight"))[0],
        hidden_size=width,
        intermediate_size=size("feed_forward_length"),
        num_hidden_layers=size("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=size("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=size("context_length"),
        rms_norm_eps=_short(values["llama.attention.layer_norm_rms_epsilon"]),
        rope_parameters=_rope(values, tensors, head_dim),
        attention_bias="blk.0.attn_q.bias" in tensors,
        mlp_bias="blk.0.ffn_up.bias" in tensors,
        tie_word_embeddings="output.weight" not in tensors,
        bos_token_id=token["bos"],
        eos_token_id=ends[0] if len(ends) == 1 else ends or None,
        pad_token_id=token["padding"],
        dtype=_dtype(tensors),
    )


def _dtype(tensors: dict[str, Any]) -> str:
    """Returns the dtype that holds all matrices exactly."""
    kinds = {stored_as(tensor)[0] for tensor in tensors.values() if len(tensor.shape) > 1}
    return {"F16": "float16", "BF16": "bfloat16"}.get(kinds.pop(), "float32") if len(kinds) == 1 else "float32"


def _needed(tensors: dict[str, Any], name: str) -> Any:
    if name not in tensors:
        raise ValueError(f"{name} is missing")
    return tensors[name]


def _short(value: float) -> float:
    """Returns the shortest number that is this float32 value: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _rope(values: dict[str, Any], tensors: dict[str, Any], head_dim: int) -> dict[str, Any]:
    """Returns the rotary embedding's parameters. Llama 3 has its scaling as a tensor, of factors by which each pair
    turns more slowly; the parameters are those that give these factors.
    """
    theta = _short(values.get("llama.rope.freq_base", 10000.0))
    kind = values.get("llama.rope.scaling.type", "none")
    if ROPE_FACTORS in tensors:
        factors = np.asarray(tensors[ROPE_FACTORS].data, np.float32).flatten()  # (P / 2)
        largest = round(float(factors.max()), 3)
        if factors.shape != (head_dim // 2,) or not np.allclose(factors, _llama3(theta, head_dim, largest), rtol=1e-3):
            raise ValueError(f"{ROPE_FACTORS} has none of the rotary scalings of Llama 3")
        return {
            "rope_type": "llama3",
            "rope_theta": theta,
            "factor": largest,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": CONTEXT_OF_LLAMA_3,
        }
    if kind == "linear":
        return {"rope_type": "linear", "rope_theta": theta, "factor": _short(values["llama.rope.scaling.factor"])}
    if kind != "none":
        raise ValueError(f"its rotary embedding is scaled by {kind!r}; expected linear, that of Llama 3, or none")
    return {"rope_type": "default", "rope_theta": theta}


def _llama3(theta: float, head_dim: int, factor: float) -> np.ndarray:
    """Returns by how much each rotary pair turns more slowly in Llama 3: not at all where its wave is short, `factor`
    where it is long, and between in between (transformers' _compute_llama3_parameters).
    """
    waves = 2 * math.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)  # (P / 2), in tokens
    share = np.clip((CONTEXT_OF_LLAMA_3 / waves - 1) / (4 - 1), 0, 1)  # of the pair's own speed that is kept
    return 1 / ((1 - share) / factor + share)
