"""Llama's norm and MLP, as transformers has them in each family, by the kernels that are chosen for their device."""

from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from .families import FAMILIES, DecoderLayer, TeacherConfig
from .kernels import kernels_for

SILU = (nn.SiLU, type(ACT2FN["silu"]))
NORMS = tuple(family.norm for family in FAMILIES.values())
MLPS = tuple(family.mlp for family in FAMILIES.values())
OF_HEADS = ("q_norm", "k_norm")


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


def attention_layer(config: TeacherConfig, index: int) -> DecoderLayer:
    """Returns a new decoder layer of a teacher's family, with the norms and the MLP of this module."""
    layer = FAMILIES[config.model_type].layer(config, index)
    use_kernels(layer, TrainedMLP)
    return layer


def use_kernels(model: nn.Module, mlp: type[LlamaMLP]) -> None:
    """Makes transformers' norms and MLPs within a model those of this module, `mlp` being the class of the MLPs. Names
    and values of the weights stay as they are, and so do modules of other architectures, and norms within attention.
    """
    for name, module in model.named_modules():
        if type(module) in NORMS and not name.endswith(OF_HEADS):
            module.__class__ = RMSNorm
        elif type(module) in MLPS:
            module.__class__ = mlp
