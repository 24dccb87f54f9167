"""Random models of a few thousand weights, made in memory, and parameters with gradients."""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llamba import LlambaConfig, LlambaForCausalLM
from llamba.families import FAMILIES
from model_utils import apply_replacements


def tiny_config(**changes):
    ssm = {"d_state": 8, "n_v_heads": 4, "n_qk_heads": 2, "chunk_size": 8}
    values = dict(vocab_size=50, d_model=32, n_layer=4, mlp_cfg={"intermediate_size": 48}, ssm_cfg=ssm)
    return LlambaConfig(**{**values, **changes})


def tiny_teacher(**changes):
    torch.manual_seed(1)
    values = dict(vocab_size=56, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4)
    values |= dict(num_key_value_heads=2, max_position_embeddings=128)
    return LlamaForCausalLM(LlamaConfig(**{**values, **changes})).eval()


def tiny_student(**changes):
    """Returns a student whose weights are larger than usual, so that every part of the model changes the logits."""
    torch.manual_seed(0)
    student = LlambaForCausalLM(tiny_config(**changes)).eval()
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return student


def tiny_hybrid(dtype=torch.float32, teacher=None, heads=None, **changes):
    """Returns `tiny_student(**changes)` in `dtype` with layers 1 and 3 of a teacher, `tiny_teacher()` by default, and
    with `heads` (layer -> query heads) of other layers.
    """
    student = tiny_student(**changes).to(dtype)
    apply_replacements(student, teacher or tiny_teacher(), [1, 3], heads)
    return student


def tiny_model(kind, vocab_size, initializer_range=0.3):
    """Returns a "llama", a "mamba" or a "hybrid" of the two that reads 4096 tokens. The Llama's weights are so large
    that answers differ clearly.
    """
    shape = dict(vocab_size=vocab_size, max_position_embeddings=4096)
    teacher = tiny_teacher(**shape, initializer_range=initializer_range)
    if kind == "hybrid":
        return tiny_hybrid(teacher=teacher, vocab_size=vocab_size)
    return teacher if kind == "llama" else tiny_student(vocab_size=vocab_size)


def tokens(batch=2, length=21, seed=0):
    return torch.randint(0, 50, (batch, length), generator=torch.Generator().manual_seed(seed))


class MixedParameters(nn.Module):
    """Has parameters of zero to three dimensions, one of them frozen."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        g = torch.Generator().manual_seed(0)
        self.matrix = nn.Parameter(torch.randn(7, 5, generator=g).to(dtype))
        self.conv = nn.Parameter(torch.randn(4, 1, 3, generator=g).to(dtype))
        self.bias = nn.Parameter(torch.randn(6, generator=g).to(dtype))
        self.scale = nn.Parameter(torch.randn((), generator=g).to(dtype))
        self.frozen = nn.Parameter(torch.randn(3, 3, generator=g).to(dtype), requires_grad=False)


def give_gradients(model, seed, factor=1.0):
    """Sets random gradients on all trainable parameters."""
    g = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = (factor * torch.randn(parameter.shape, generator=g)).to(parameter.dtype)


def weights(model):
    """Returns a copy of every parameter by name."""
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def tiny_family(kind, **changes):
    """Returns a random teacher of a family, all of whose biases and norms do something. Its heads are together wider
    than the model where the family lets them be.
    """
    torch.manual_seed(5)
    values = dict(vocab_size=1030, hidden_size=32, intermediate_size=40, num_hidden_layers=4, num_attention_heads=4)
    values |= dict(num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2)
    values |= {"mistral": {"head_dim": 12, "sliding_window": None}, "qwen3": {"head_dim": 16}}.get(kind, {})
    family = FAMILIES[kind]
    model = family.model(family.config(**{**values, **changes})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias") or "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
    return model
