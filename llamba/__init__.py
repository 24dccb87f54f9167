"""Llamba and its hybrids for transformers. Importing the package registers `llamba` with AutoConfig and
AutoModelForCausalLM. Imports no other room; knows of no rank, option or run.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .block import LlambaBlock
from .cache import LlambaCache, SharedPrefix, cache_bytes, can_share
from .configuration import LlambaConfig, whole_and_parts
from .families import attention_cfg_from
from .mixer import DiscreteMamba2
from .modeling import LlambaForCausalLM, LlambaModel

AutoConfig.register("llamba", LlambaConfig)
AutoModelForCausalLM.register(LlambaConfig, LlambaForCausalLM)

__all__ = [
    "DiscreteMamba2",
    "LlambaBlock",
    "LlambaCache",
    "LlambaConfig",
    "LlambaForCausalLM",
    "LlambaModel",
    "SharedPrefix",
    "attention_cfg_from",
    "cache_bytes",
    "can_share",
    "whole_and_parts",
]
