"""Llamba and its hybrids for transformers. Importing the package registers `llamba` with AutoConfig and
AutoModelForCausalLM. Imports no other room; knows of no rank, option or run.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from .cache import LlambaCache, SharedPrefix, can_share
from .configuration import LlambaConfig, attention_cfg_from
from .mixer import DiscreteMamba2
from .modeling import LlambaBlock, LlambaForCausalLM, LlambaModel

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
    "can_share",
]
