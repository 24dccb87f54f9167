"""Some heads of a teacher's attention, which a layer keeps beside a mixer of the others (arXiv 2602.11374)."""

from collections import Counter
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import CacheLayerMixin
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb, eager_attention_forward

from .families import FAMILIES, Attention


class KeptHeads(nn.Module):
    """Attends by some query heads of an attention, each with its own key/value head, which heads of a group share:
    u (B, L, D) -> (B, L, D). With all heads it computes what the whole attention does.

    whole: of the attention that they are of, the form alone; weights are copied by `teacher_parts`.
    heads: indices of query heads, in order. with_bias: whether o_proj has a bias, if the whole attention's has one.
    """

    def __init__(self, whole: Attention, heads: list[int], with_bias: bool = True) -> None:
        super().__init__()
        self.config, self.layer_idx, self.head_dim = whole.config, whole.layer_idx, whole.head_dim
        self.scaling, self.attention_dropout, self.is_causal = whole.scaling, whole.attention_dropout, True
        sharing = Counter(head // whole.num_key_value_groups for head in heads)
        self.heads, self.kv_heads = heads, list(sharing)
        self.sharing = list(sharing.values())  # query heads of each key/value head
        self.is_even = len(set(self.sharing)) == 1  # then attention itself repeats keys and values
        self.num_key_value_groups = self.sharing[0] if self.is_even else 1

        width, d_query, d_key = whole.q_proj.in_features, len(heads) * self.head_dim, len(sharing) * self.head_dim
        self.q_proj = nn.Linear(width, d_query, bias=whole.q_proj.bias is not None)
        self.k_proj = nn.Linear(width, d_key, bias=whole.k_proj.bias is not None)
        self.v_proj = nn.Linear(width, d_key, bias=whole.v_proj.bias is not None)
        self.o_proj = nn.Linear(d_query, whole.o_proj.out_features, bias=with_bias and whole.o_proj.bias is not None)
        is_normed = FAMILIES[whole.config.model_type].normed_heads
        self.q_norm: nn.Module | None = whole.q_norm if is_normed else None
        self.k_norm: nn.Module | None = whole.k_norm if is_normed else None

    def forward(
        self,
        u: Tensor,
        cache: CacheLayerMixin | None = None,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Returns the heads' output: u (B, L, D) -> (B, L, D).

        cache: the keys and values before u; those of u are added to it.
        position_embeddings: cosines and sines of the rotary positions, (1 or B, L, head_dim) each.
        attention_mask: as the attention of `config` has it; None is causal.
        """
        assert position_embeddings is not None
        query, key, value = (
            projection(u).unflatten(-1, (-1, self.head_dim))  # (B, L, heads, head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        query, key, value = (m.transpose(1, 2) for m in (query, key, value))  # (B, heads, L, head_dim)
        query, key = apply_rotary_pos_emb(query, key, *position_embeddings)
        if cache is not None:
            key, value = cache.update(key, value)  # (B, kv_heads, P + L, head_dim)
        if not self.is_even:
            key, value = self._repeated(key), self._repeated(value)  # (B, heads, P + L, head_dim)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        output, _ = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs)
        return self.o_proj(output.flatten(2))  # (B, L, D)

    def _repeated(self, m: Tensor) -> Tensor:
        """Repeats each key/value head for the query heads that share it."""
        each = zip(m.split(1, dim=1), self.sharing, strict=True)
        return torch.cat([head.expand(-1, n, -1, -1) for head, n in each], dim=1)
