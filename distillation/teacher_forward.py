"""The teacher's forward pass over whole windows."""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel


def runs_by_layers(model: PreTrainedModel) -> bool:
    """Returns whether the model is a Llama whose attention is causal by itself, without a mask."""
    return type(model) is LlamaForCausalLM and model.config._attn_implementation == "sdpa"


def last_hidden_states(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Returns `model.base_model(input_ids).last_hidden_state`, (B, S, D), of whole windows. A Llama's layers are run
    here one by one: transformers' forward pass reads from the device, at its start, whether positions are consecutive,
    and the thread that runs the teacher would wait there for the answer before.
    """
    if not runs_by_layers(model):
        return model.base_model(input_ids, use_cache=False).last_hidden_state
    llama = model.base_model
    x = llama.embed_tokens(input_ids)  # (B, S, D)
    positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, S)
    rotary = llama.rotary_emb(x, position_ids=positions)
    for layer in llama.layers:
        x = layer(x, attention_mask=None, position_ids=positions, position_embeddings=rotary, use_cache=False)
    return llama.norm(x)
