"""Llama's norm and MLP, as transformers has them, by the kernels that are chosen for their device."""

from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaMLP, LlamaRMSNorm

from .kernels import kernels_for

SILU = (nn.SiLU, type(ACT2FN["silu"]))


class RMSNorm(LlamaRMSNorm):
    """Norms hidden states (..., D)."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        norm = kernels_for(hidden_states.device.type, hidden_states.dtype).elementwise.rms_norm
        return norm(hidden_states, self.weight, self.variance_epsilon)


class TrainedMLP(LlamaMLP):
    """Computes down(act(gate(x)) * up(x)), fused in training. Elsewhere each length of text would be compiled for."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.act_fn, self.training))


class FrozenMLP(LlamaMLP):
    """Computes the same, always fused: for a model that is not trained, and reads windows of one length."""

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(gated(self.gate_proj(x), self.up_proj(x), self.act_fn, True))


def gated(gate: Tensor, up: Tensor, act: nn.Module, fused: bool) -> Tensor:
    """Returns act(gate) * up. fused: by one kernel, where there is one for this device and activation."""
    if fused and isinstance(act, SILU):
        return kernels_for(gate.device.type, gate.dtype).elementwise.swiglu(gate, up)
    return act(gate) * up


def attention_layer(config: LlamaConfig, index: int) -> LlamaDecoderLayer:
    """Returns a new decoder layer of a Llama, with the norms and the MLP of this module."""
    layer = LlamaDecoderLayer(config, index)
    use_kernels(layer, TrainedMLP)
    return layer


def use_kernels(model: nn.Module, mlp: type[LlamaMLP]) -> None:
    """Makes transformers' norms and MLPs within a model those of this module, `mlp` being the class of the MLPs. Names
    and values of the weights stay as they are, and so do modules of other architectures.
    """
    for module in model.modules():
        if type(module) is LlamaRMSNorm:
            module.__class__ = RMSNorm
        elif type(module) is LlamaMLP:
            module.__class__ = mlp
