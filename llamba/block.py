"""A layer of a Llamba: a Llama's with a mixer in place of attention, or a mixer beside some of the teacher's heads."""

from typing import Any

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache import LlambaCache, RecurrentLayer
from .configuration import LlambaConfig
from .families import TeacherConfig
from .kept_heads import KeptHeads
from .llama import RMSNorm, attention_layer, gated
from .mixer import DiscreteMamba2


class LlambaMLP(nn.Module):
    """Computes Llama's gated MLP: down(act(gate(x)) * up(x))."""

    def __init__(self, config: LlambaConfig) -> None:
        super().__init__()
        mlp = config.mlp_cfg
        self.gate_proj = nn.Linear(config.d_model, mlp["intermediate_size"], bias=mlp["bias"])
        self.up_proj = nn.Linear(config.d_model, mlp["intermediate_size"], bias=mlp["bias"])
        self.down_proj = nn.Linear(mlp["intermediate_size"], config.d_model, bias=mlp["bias"])
        self.act = ACT2FN[mlp["act_fn"]]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.act, self.training))


class LlambaBlock(GradientCheckpointingLayer):
    """Adds mixer(norm(x)) to x, then mlp(norm(x)): x (B, L, D) -> (B, L, D). A layer with kept heads adds their
    attention to what the mixer gives, and has norms and an MLP of the teacher's form.

    attention_config: of the teacher's layers, if any layer has kept heads.
    """

    def __init__(self, config: LlambaConfig, layer_idx: int, attention_config: TeacherConfig | None = None) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        kept = config.heads_of(layer_idx)
        teachers = None
        if kept:
            assert attention_config is not None
            teachers = attention_layer(attention_config, layer_idx)
        eps = config.norm_epsilon
        # The norm comes first: parameters are drawn, and their gradients exchanged, in the order that they always had.
        self.input_layernorm = RMSNorm(config.d_model, eps=eps) if teachers is None else teachers.input_layernorm
        self.mixer = DiscreteMamba2(config, len(kept))
        self.attention: KeptHeads | None = None
        if teachers is None:
            self.post_attention_layernorm = RMSNorm(config.d_model, eps=eps)
            self.mlp = LlambaMLP(config)
        else:
            # The mixer's bias, where it has one, is fitted to all of attention's output, so that it includes this one.
            self.attention = KeptHeads(teachers.self_attn, kept, with_bias=self.mixer.out_proj.bias is None)
            self.post_attention_layernorm, self.mlp = teachers.post_attention_layernorm, teachers.mlp
        self.dropout = nn.Dropout(config.resid_dropout)

    def forward(
        self,
        x: Tensor,
        past_key_values: LlambaCache | None = None,
        token_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **attention_inputs: Any,
    ) -> Tensor:
        states = None if past_key_values is None else past_key_values.layers[self.layer_idx]
        x = x + self.dropout(self.mix(self.input_layernorm(x), states, token_mask, seq_idx, **attention_inputs))
        return x + self.dropout(self.mlp(self.post_attention_layernorm(x)))

    def mix(
        self,
        u: Tensor,
        states: RecurrentLayer | None = None,
        token_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **attention_inputs: Any,
    ) -> Tensor:
        """Returns what stands where the teacher has attention: u (B, L, D) -> (B, L, D).

        attention_inputs: of kept heads, `KeptHeads.forward`'s.
        """
        if self.attention is None:
            return self.mixer(u, states, token_mask, seq_idx)
        return self.attention(u, states, **attention_inputs) + self.mixer(u, states, token_mask, seq_idx)
