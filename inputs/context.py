"""How many tokens a model can read at once, by its config."""

import math

from transformers import PretrainedConfig

from llamba import LlambaConfig


def stated_length(config: PretrainedConfig) -> int | None:
    """Returns the length of the context that a config states, whatever its positions' scaling adds; None if it states
    none. A Llamba has the context of its layers from a teacher.
    """
    if isinstance(config, LlambaConfig):
        return stated_length(config.attention_config()) if config.has_attention else None
    text = config.get_text_config()
    stated = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    return stated if isinstance(stated, int) and stated > 0 else None  # XLNet says -1


def shortest(readers: dict[str, PretrainedConfig]) -> tuple[str, int] | None:
    """Returns which of the readers, by name, can read the fewest tokens at once, and how many; None if no limit."""
    limits = {name: limit for name, config in readers.items() if (limit := context_length(config)) is not None}
    return min(limits.items(), key=lambda item: item[1], default=None)


def context_length(config: PretrainedConfig) -> int | None:
    """Returns the most tokens that a model of this config can read at once, or None if nothing limits it.

    Positions beyond the learned ones are an index error, and rotary ones beyond the limit silently give nonsense. How
    far a scaling of the rotary positions reaches: configs with "linear" or "dynamic" state the length before it; those
    with "yarn" either length, and the one before it within the scaling; those with "llama3" or "longrope" the length
    after it. (transformers' modeling_rope_utils.py; published configs differ, so this is the longest reading.)
    """
    if isinstance(config, LlambaConfig):
        return context_length(config.attention_config()) if config.has_attention else None
    stated = stated_length(config)
    rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
    factor = rope.get("factor")
    if stated is None or not isinstance(factor, int | float) or not math.isfinite(factor):
        return stated  # a dictionary per kind of layer has no factor
    if rope["rope_type"] in ("linear", "dynamic"):
        return max(stated, int(factor * stated))
    if rope["rope_type"] == "yarn":
        return max(stated, int(factor * rope["original_max_position_embeddings"]))
    return stated
