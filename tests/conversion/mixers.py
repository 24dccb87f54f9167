"""Small attention layers, and what the mixers made of them give to their scan."""

import torch
from transformers.models.llama.modeling_llama import LlamaAttention, LlamaConfig, LlamaRotaryEmbedding

from conversion.build import new_mixer
from conversion.heads import HeadFit
from conversion.student_config import student_config

EXACT = {"rtol": 1e-4, "atol": 1e-4}


def attention_of(ratio, **changes):
    """Returns an attention layer with weights and biases drawn, of two key/value heads for `ratio` query heads each."""
    torch.manual_seed(ratio)
    values = dict(hidden_size=16 * ratio, num_attention_heads=2 * ratio, num_key_value_heads=2, head_dim=8)
    values |= dict(intermediate_size=8, num_hidden_layers=1, vocab_size=8, attention_bias=True)
    config = LlamaConfig(**{**values, **changes})
    config._attn_implementation = "sdpa"
    attention = LlamaAttention(config, 0).requires_grad_(False)
    for name, parameter in attention.named_parameters():
        parameter.normal_(std=1.0 if "bias" in name else 0.3)
    return attention


def mixer_for(attention, **options):
    return new_mixer(student_config(attention.config, **options), seed=0).requires_grad_(False)


def scan_inputs(mixer, u):
    """Returns what the mixer gives its scan for u (B, S, D): x (B, S, H, P), decay (B, S, H), B and C (B, S, H, N)."""
    seen = []
    scan = mixer._scan
    mixer._scan = lambda *inputs: seen.append(inputs) or scan(*inputs)
    mixer(u)
    x, log_decay, B, C, *_ = seen[0]
    return x, log_decay.exp(), B, C


def heads(attention, u, name):
    """Returns what each query head has of a projection, as a loop over heads: (B, S, H, P)."""
    projected = getattr(attention, f"{name}_proj")(u).unflatten(-1, (-1, attention.head_dim))
    group = attention.config.num_attention_heads // projected.shape[2]
    return torch.stack([projected[:, :, h // group] for h in range(attention.config.num_attention_heads)], 2)


def scores(a, b):
    return torch.einsum("bihn,bjhn->bhij", a, b)


def traces(attention, n=16, length=32):
    """Returns inputs and outputs of the attention; its keys have a mean, as those of trained models do."""
    u = torch.randn(n, length, attention.config.hidden_size) + 0.5
    angles = LlamaRotaryEmbedding(attention.config)(u, torch.arange(length)[None])
    return u, attention(u, position_embeddings=angles, attention_mask=None)[0]


def relative(mixer, u, a):
    return ((mixer(u) - a).norm() / a.norm()).item()


def drawn_fit(n_heads, width=8):
    """Returns a fit with a constant, means, skips, taps, and a weight and an angle of each pair, of all signs."""
    cos, sin = torch.randn(2, n_heads, width // 2)
    skip, constant = torch.randn(2, n_heads)
    mean, taps = torch.randn(n_heads, width), torch.randn(n_heads, 4)
    return HeadFit(2.0 ** torch.arange(n_heads), cos, sin, skip, constant, mean, taps)


def pair_scores(q, k, cos, sin):
    """Returns the weighted scores of q and k (B, S, H, P) as a loop over pairs: (B, H, S, S)."""
    half, total = q.shape[-1] // 2, 0
    for p in range(half):
        (q1, q2), (k1, k2) = ((part[..., [p]], part[..., [p + half]]) for part in (q, k))
        along, across = scores(q1, k1) + scores(q2, k2), scores(q1, k2) - scores(q2, k1)
        total = total + cos[:, p, None, None] * along + sin[:, p, None, None] * across
    return total


def tapped(attention, u, taps):
    """Returns of each head the taps' sum over the last values, whose biases are there before the beginning too."""
    bias = heads(attention, torch.zeros_like(u[:, :1]), "v")
    v = torch.cat([bias.expand(-1, taps.shape[1] - 1, -1, -1), heads(attention, u, "v")], 1)
    length = u.shape[1]
    last = range(taps.shape[1] - 1, -1, -1)
    return sum(weight[:, None] * v[:, i : i + length] for weight, i in zip(taps.unbind(1), last, strict=True))
