"""How many tokens a model can read at once, by its config."""

import math

from transformers import PretrainedConfig


def context_length(config: PretrainedConfig) -> int | None:
    """Returns the most tokens that a model of this config can read at once, or None if the config sets no limit.

    Positions beyond the learned ones are an index error, and rotary ones beyond the limit silently give nonsense. How
    far a scaling of the rotary positions reaches: configs with "linear" or "dynamic" state the length before it; those
    with "yarn" either length, and the one before it within the scaling; those with "llama3" or "longrope" the length
    after it. (transformers' modeling_rope_utils.py; published configs differ, so this is the longest reading.)
    """
    text = config.get_text_config()
    limit = getattr(text, "max_position_embeddings", None) or getattr(text, "max_seq_len", None)
    if not isinstance(limit, int) or limit < 1:  # XLNet says -1
        return None
    rope = getattr(text, "rope_parameters", None) or {}
    factor = rope.get("factor")
    if not isinstance(factor, int | float) or not math.isfinite(factor):  # of another scaling, or one per kind of layer
        return limit
    if rope["rope_type"] in ("linear", "dynamic"):
        return max(limit, int(factor * limit))
    if rope["rope_type"] == "yarn":
        return max(limit, int(factor * rope["original_max_position_embeddings"]))
    return limit
