"""What blocks do to each element besides their products, scan and convolution, in a plain and in a fused form:

    rms_norm(x, weight, eps)       weight x / sqrt(mean(x^2) + eps), the mean over the last dimension
    swiglu(gate, up)               silu(gate) up
    gate(y, x, D, z, z_bias)       (y + D x) silu(z + z_bias)

The plain forms are a kernel for each operation, which reads and writes everything once more, in the dtype of the
inputs. The fused ones compute in float32, or better, and round once. They keep their inputs alone for backward.
"""

import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

logger = logging.getLogger("llamba")

Function = Callable[..., Tensor]
PLAIN = "plain PyTorch"


class Elementwise(NamedTuple):
    """Holds the three functions in one form, with its name for the log."""

    name: str
    rms_norm: Function
    swiglu: Function
    gate: Function


# --- plain ---------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Returns what transformers' LlamaRMSNorm does of x (..., D), bit for bit. weight (D,)."""
    wide = x.to(torch.float32)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """Returns the inner activations (..., F) of a gated MLP from its two projections (..., F)."""
    return F.silu(gate) * up


def gate(y: Tensor, x: Tensor, D: Tensor, z: Tensor, z_bias: Tensor | None) -> Tensor:
    """Returns what a mixer's last projection reads, (B, L, d_inner), from the scan's result y and input x, each
    (B, L, H, P), D (H,), the gate z (B, L, d_inner) and its bias (d_inner,).
    """
    y = (y + D[:, None] * x).flatten(2)  # (B, L, d_inner)
    return y * F.silu(z if z_bias is None else z + z_bias)


# --- fused ---------------------------------------------------------------------------------------------------

MOST_SHAPES = 8  # torch.compile gives up a function after as many (torch._dynamo.config.recompile_limit)


class Region:
    """Is a function that torch.compile makes one kernel of, and another one or a few of its gradients.

    They are tried on the first inputs of a shape. If the compiler fails, or the first launch of what it made, the
    plain form takes over: a run of days must not end at its first step for lack of some speed.
    """

    def __init__(self, title: str, plain: Function, forward: Function, backward: Callable[..., tuple]) -> None:
        """title: for a warning. backward: from the gradient of the result, and the inputs, to those of the inputs."""
        self.title, self.plain, self.forward, self.backward = title, plain, forward, backward
        self.has_failed = False
        self.works: dict[tuple, bool] = {}  # by what torch.compile compiles anew for

    @functools.cached_property
    def compiled(self) -> tuple[Callable, Callable]:
        return torch.compile(self.forward, dynamic=False), torch.compile(self.backward, dynamic=False)

    def __call__(self, *inputs: Tensor | None) -> Tensor:
        if torch.compiler.is_compiling():  # a block that is compiled as a whole
            return self.forward(*inputs)
        learns = torch.is_grad_enabled() and any(m is not None and m.requires_grad for m in inputs)
        key = (learns, *(None if m is None else (m.device, m.dtype, m.shape, m.stride()) for m in inputs))
        if key not in self.works:
            self.works[key] = not self.has_failed and len(self.works) < MOST_SHAPES and self._try(inputs, learns)
        return _Compiled.apply(self.compiled, *inputs) if self.works[key] else self.plain(*inputs)

    @torch.no_grad()
    def _try(self, inputs: tuple[Tensor | None, ...], learns: bool) -> bool:
        """Returns whether the compiled forms run on such inputs, of which nothing is changed; backward if it `learns`,
        for a teacher does without what that takes.
        """
        try:
            forward, backward = self.compiled
            result = forward(*_detached(inputs))
            if learns:
                backward(result, *_detached(inputs))
        except torch.OutOfMemoryError:
            raise  # the plain form takes more
        except Exception as error:  # of the compiler or of Triton's launch, whose errors have no common class
            reason = (str(error).strip() or repr(error)).splitlines()[0]
            logger.warning("%s cannot be compiled and runs slower: %s", self.title, reason)
            self.has_failed = True
        return not self.has_failed


class _Compiled(torch.autograd.Function):
    """Calls a region's compiled functions, always without autograd, so that neither is compiled for both."""

    @staticmethod
    def forward(ctx: Any, compiled: tuple[Callable, Callable], *inputs: Tensor | None) -> Tensor:
        ctx.compiled = compiled
        ctx.save_for_backward(*inputs)
        return compiled[0](*_detached(inputs))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.compiled[1](gradient.contiguous(), *_detached(ctx.saved_tensors))


def _detached(inputs: tuple[Tensor | None, ...]) -> list[Tensor | None]:
    return [None if m is None else m.detach() for m in inputs]


def _wide(m: Tensor) -> Tensor:
    return m.to(torch.promote_types(m.dtype, torch.float32))


def library_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Computes `rms_norm` by torch's own kernel, or as part of a block that is compiled as a whole."""
    if torch.compiler.is_compiling():
        return one_rounding_rms_norm(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def one_rounding_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    wide = _wide(x)
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return (_wide(weight) * wide).to(x.dtype)


def one_rounding_swiglu(gate: Tensor, up: Tensor) -> Tensor:
    return (F.silu(_wide(gate)) * _wide(up)).to(gate.dtype)


def swiglu_gradients(d_out: Tensor, gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    d, g = _wide(d_out), _wide(gate)
    sigmoid = g.sigmoid()
    d_gate = d * _wide(up) * _silu_slope(g, sigmoid)
    return d_gate.to(gate.dtype), (d * g * sigmoid).to(up.dtype)


def one_rounding_gate(y: Tensor, x: Tensor, D: Tensor, z: Tensor, z_bias: Tensor | None) -> Tensor:
    total, shifted = _gate_parts(y, x, D, z, z_bias)
    return (total * F.silu(shifted)).to(y.dtype)


def gate_gradients(d_out: Tensor, y: Tensor, x: Tensor, D: Tensor, z: Tensor, z_bias: Tensor | None) -> tuple:
    d = _wide(d_out)  # (B, L, d_inner)
    total, shifted = _gate_parts(y, x, D, z, z_bias)
    sigmoid = shifted.sigmoid()
    d_z = (d * total * _silu_slope(shifted, sigmoid)).to(z.dtype)
    d_y = (d * shifted * sigmoid).unflatten(2, x.shape[2:])  # (B, L, H, P)
    d_x, d_D = _wide(D)[:, None] * d_y, (d_y * _wide(x)).sum((0, 1, 3))  # (B, L, H, P), (H,)
    # Of the rounded d_z: else the compiler would write it once more, in float32.
    d_z_bias = None if z_bias is None else _wide(d_z).sum((0, 1)).to(z_bias.dtype)
    return d_y.to(y.dtype), d_x.to(x.dtype), d_D.to(D.dtype), d_z, d_z_bias


def _gate_parts(y: Tensor, x: Tensor, D: Tensor, z: Tensor, z_bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns y + D x and z + z_bias, (B, L, d_inner) each."""
    total = (_wide(y) + _wide(D)[:, None] * _wide(x)).flatten(2)
    return total, _wide(z) if z_bias is None else _wide(z) + _wide(z_bias)


def _silu_slope(x: Tensor, sigmoid: Tensor) -> Tensor:
    return sigmoid * (1 + x * (1 - sigmoid))


# --- the two forms -------------------------------------------------------------------------------------------

PLAIN_ELEMENTWISE = Elementwise(PLAIN, rms_norm, swiglu, gate)
FUSED_ELEMENTWISE = Elementwise(
    "F.rms_norm and torch.compile",
    library_rms_norm,
    Region("SwiGLU", swiglu, one_rounding_swiglu, swiglu_gradients),
    Region("the mixers' gate", gate, one_rounding_gate, gate_gradients),
)
