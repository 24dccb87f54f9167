"""Puts parts of a teacher into a Llamba: whole decoder layers, and heads of its attention. Knows of no option; what can
be put where is checked by the config.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from .block import LlambaBlock
from .configuration import whole_and_parts
from .families import Attention, DecoderLayer, TeacherConfig, attention_cfg_from
from .kept_heads import KeptHeads
from .llama import attention_layer
from .mixer import DiscreteMamba2
from .modeling import LlambaForCausalLM

Pair = tuple[Tensor | None, Tensor | None]  # a tensor, and what it becomes; None and None where both have none


@torch.no_grad()
def take_parts(
    student: LlambaForCausalLM,
    teacher: TeacherConfig,
    layers: Iterable[int],
    heads: Mapping[int, list[int]],
    layer_of: Callable[[int], DecoderLayer],
) -> None:
    """Puts independent copies of a teacher's decoder layers, `layer_of` each index, into the student, on its device and
    in its dtype: whole ones at `layers`; at each of `heads` (layer -> query heads) the norms, the MLP and those heads,
    beside the student's own mixer without the heads in whose place they are. Adds the rotary embedding, and records the
    layout in the config.

    Weights of the teacher's that are on the meta device become NaN, so that who forgets to fill them cannot train on
    noise.
    """
    config, backbone = student.config, student.backbone
    config.attention_cfg = attention_cfg_from(teacher)
    config.attention_layers, config.attention_heads = whole_and_parts(layers, heads, teacher.num_attention_heads)
    config.fitted_beside = {}
    attention_config = config.attention_config()
    device, dtype = backbone.embedding.weight.device, backbone.embedding.weight.dtype
    for index in config.layers_with_attention:
        own, given = backbone.layers[index], layer_of(index)
        layer: nn.Module
        with torch.device("meta"):
            if index in config.attention_layers:
                layer = attention_layer(attention_config, index)
            else:
                layer = LlambaBlock(config, index, attention_config)
        layer = layer.to(dtype).to_empty(device=device)
        if isinstance(layer, LlambaBlock):
            assert isinstance(own, LlambaBlock)
            pairs = [*_of_block(layer, given), *_of_mixer(layer.mixer, own.mixer, config.heads_of(index))]
        else:
            pairs = list(zip(layer.parameters(), given.parameters(), strict=True))
        for new, old in pairs:
            _copy(new, old)
        backbone.layers[index] = layer.train(student.training)
    backbone.rotary_emb = LlamaRotaryEmbedding(attention_config).to(device)


def _copy(new: Tensor | None, old: Tensor | None) -> None:
    if new is None or old is None:
        assert new is old
    elif old.is_meta:
        new.fill_(float("nan"))
    else:
        new.copy_(old)


def _of_block(block: LlambaBlock, given: DecoderLayer) -> Iterator[Pair]:
    """Yields what a block with kept heads has of the teacher's layer."""
    for name in ("input_layernorm", "post_attention_layernorm", "mlp"):
        yield from zip(block.get_submodule(name).parameters(), given.get_submodule(name).parameters(), strict=True)
    assert block.attention is not None
    yield from _of_heads(block.attention, given.self_attn)


@torch.no_grad()
def copied_heads(attention: Attention, heads: list[int]) -> KeptHeads:
    """Returns a copy of some heads of an attention, without a bias of o_proj."""
    own = KeptHeads(attention, heads, with_bias=False).to(attention.o_proj.weight)
    for new, old in _of_heads(own, attention):
        _copy(new, old)
    return own.eval()


def _of_heads(own: KeptHeads, given: Attention) -> Iterator[Pair]:
    rows, key_rows = (_numbers_of(which, own.head_dim) for which in (own.heads, own.kv_heads))
    for name, kept in (("q_proj", rows), ("k_proj", key_rows), ("v_proj", key_rows)):
        yield from _rows(own.get_submodule(name), given.get_submodule(name), kept)
    yield own.o_proj.weight, given.o_proj.weight[:, rows]  # (D, heads * head_dim)
    if own.o_proj.bias is not None:
        yield own.o_proj.bias, given.o_proj.bias
    if own.q_norm is not None and own.k_norm is not None:
        yield from zip(own.q_norm.parameters(), given.q_norm.parameters(), strict=True)
        yield from zip(own.k_norm.parameters(), given.k_norm.parameters(), strict=True)


def _of_mixer(own: DiscreteMamba2, given: DiscreteMamba2, kept: list[int]) -> Iterator[Pair]:
    """Yields what a mixer has of a larger one: all heads but those `kept` of the teacher's, each with B and C of its
    group.
    """
    heads = [head for head in range(given.n_v_heads) if head not in kept]
    groups = [head * given.n_qk_heads // given.n_v_heads for head in heads]
    x = _numbers_of(heads, given.headdim)
    b = [given.d_inner + i for i in _numbers_of(groups, given.d_state)]
    channels = [*x, *b, *(i + given.n_qk_heads * given.d_state for i in b)]  # of x, B and C
    z = [given.d_xBC + i for i in x]
    decays = [given.d_xBC + given.d_inner + head for head in heads]
    yield from _rows(own.in_proj, given.in_proj, [*channels, *z, *decays])
    yield from _rows(own.conv1d, given.conv1d, channels)
    yield own.D, given.D[heads]
    yield own.z_bias, None if given.z_bias is None else given.z_bias[x]
    yield own.out_proj.weight, given.out_proj.weight[:, x]  # (D, d_inner)
    yield own.out_proj.bias, given.out_proj.bias


def _rows(own: Any, given: Any, kept: list[int]) -> Iterator[Pair]:
    yield own.weight, given.weight[kept]
    yield own.bias, None if given.bias is None else given.bias[kept]


def _numbers_of(heads: list[int], size: int) -> list[int]:
    """Returns where the numbers of some heads are, `size` of each."""
    return [head * size + i for head in heads for i in range(size)]
