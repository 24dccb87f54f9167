"""The check of doctor.py for the kernels that mixers use on a GPU: each alone and a whole mixer, forward and backward,
in the layouts of training, against the plain forms in float32.
"""

import functools
import itertools
import math
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from llamba import LlambaBlock, LlambaConfig
from llamba.elementwise import PLAIN_ELEMENTWISE, Elementwise
from llamba.kernels import PLAIN, Conv, Kernels, Scan, causal_conv, kernels_for, plain_kernels, using_kernels
from llamba.mixer import DiscreteMamba2
from llamba.ssd import ssd_chunked
from model_utils import DTYPES
from preflight.checks.basics import FAILURE, OK, WARNING, Finding, PlannedRun
from preflight.checks.machine import run_device

BATCH, LENGTH = 2, 1024  # of training; Triton compiles other kernels for other strides and divisibilities

# How far a kernel may be from the plain form in float32, ||out - truth|| / ||truth||. Rounding to bfloat16 changes a
# number by up to 0.4%; a scan rounds inputs, scores, states and results, and the gradient of a decay sums differences
# of such numbers: 1% is usual. In float32 Triton multiplies in TF32, which rounds by up to 0.05%. A kernel that mixes
# up heads, chunks or tokens is off by about 100%.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 0.01}

Form = Callable[..., tuple[Tensor, ...]]


def check_kernels(run: PlannedRun) -> Iterator[Finding]:
    device = run_device()
    if device.type == "cpu":
        yield Finding(OK, "kernels", "plain PyTorch, as always on a CPU")
        return
    own = DTYPES[run.args.dtype]
    for dtype in dict.fromkeys((own, torch.bfloat16, torch.float32)):
        for finding in compare_kernels(kernels_for(device.type, dtype), device, dtype, LlambaConfig()):
            if dtype == own or finding.status != WARNING:  # a kernel that is not installed is reported once
                yield finding


def compare_kernels(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, config: LlambaConfig, length: int = LENGTH
) -> Iterator[Finding]:
    """Compares the chosen kernels with the plain forms, on random inputs of one block of such a model: first each
    alone, then the mixer.
    """
    if kernels.elementwise.name != PLAIN:
        remedy = "TORCHDYNAMO_DISABLE=1 in the environment replaces what is compiled, or install another torch"
        differences = elementwise_errors(kernels, device, dtype, config, length)
        yield judge_errors("norms and gates", kernels.elementwise.name, dtype, differences, remedy)
    trials = (
        ("scan", kernels.scan_name, "mamba-ssm", scan_errors),
        ("convolution", kernels.conv_name, "causal-conv1d", conv_errors),
    )
    for name, chosen, package, trial in trials:
        if chosen == PLAIN:
            remedy = f"make setup-cuda   (installs {package}; requirements-cuda.txt lists what it needs)"
            found = "plain PyTorch: correct, but slower than a kernel"
            yield Finding(WARNING, titled(name, dtype), found, remedy)
        else:
            yield judge_errors(name, chosen, dtype, trial(kernels, device, dtype, config, length))
    fast = [name for name in (kernels.scan_name, kernels.conv_name) if name != PLAIN]
    if fast:
        errors = mixer_errors(kernels, device, dtype, config, length)
        yield judge_errors("mixer", " with ".join(fast), dtype, errors)


def titled(name: str, dtype: torch.dtype) -> str:
    return f"{name}, {str(dtype).removeprefix('torch.')}"


def judge_errors(
    name: str, chosen: str, dtype: torch.dtype, errors: dict[str, float], remedy: str | None = None
) -> Finding:
    """Returns the finding on the largest of some errors, each with its case. remedy: default, of packages."""
    case = max(errors, key=errors.__getitem__)
    found = f"{chosen} differs by {errors[case]:.2g} from the plain form in float32 ({case}), {TOLERANCE[dtype]:g} is"
    if errors[case] <= TOLERANCE[dtype]:
        return Finding(OK, titled(name, dtype), f"{found} allowed")
    if remedy is None:
        packages = chosen.replace("flash-linear-attention", "fla-core").replace(" with ", " ")
        remedy = f"python -m pip uninstall {packages}   (the plain form replaces it), or install another version"
    return Finding(FAILURE, titled(name, dtype), f"{found} allowed", remedy)


# --- cases ---------------------------------------------------------------------------------------------------


def elementwise_errors(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, config: LlambaConfig, length: int
) -> dict[str, float]:
    """Returns the largest error of the norm, of SwiGLU and of the mixers' gate."""
    fast, plain = (elementwise_forms(form, config) for form in (kernels.elementwise, PLAIN_ELEMENTWISE))
    inputs = draw_elementwise(config, device, dtype, length)
    return {name: largest_error(fast[name], plain[name], inputs[name]) for name in inputs}


def elementwise_forms(elementwise: Elementwise, config: LlambaConfig) -> dict[str, Form]:
    """Returns the functions of `draw_elementwise`'s tensors, by name."""
    return {
        "norm": lambda x, weight: (elementwise.rms_norm(x, weight, config.norm_epsilon),),
        "SwiGLU": lambda gate, up: (elementwise.swiglu(gate, up),),
        "gate": lambda *tensors: (elementwise.gate(*tensors),),
    }


def draw_elementwise(
    config: LlambaConfig, device: torch.device, dtype: torch.dtype, length: int
) -> dict[str, list[Tensor]]:
    """Draws what the norm, SwiGLU and the mixers' gate take, laid out as in a block."""
    n_heads, d_inner, d_ff = config.ssm_cfg["n_v_heads"], config.d_inner, config.mlp_cfg["intermediate_size"]

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x = draw_scan(config, device, dtype, length, bias=0.0)[0]  # (B, L, H, P)
    projected = normal(BATCH, length, config.d_xBC + d_inner + n_heads)
    z = projected.split([config.d_xBC, d_inner, n_heads], dim=-1)[1]  # (B, L, d_inner)
    drawn = {
        "norm": (normal(BATCH, length, config.d_model), normal(config.d_model)),
        "SwiGLU": (normal(BATCH, length, d_ff), normal(BATCH, length, d_ff)),
        "gate": (normal(*x.shape), x, normal(n_heads), z, normal(d_inner)),
    }
    return {name: [m.detach().requires_grad_() for m in tensors] for name, tensors in drawn.items()}


def scan_errors(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, config: LlambaConfig, length: int
) -> dict[str, float]:
    """Returns the scan's largest error by case: lengths that fill their chunks or not and that are multiples of 16 or
    not, heads that forget fast or slowly (A_log about 2, 0, -4, -8), and a first state.
    """
    chunk_size, errors = config.ssm_cfg["chunk_size"], {}

    def run(form: Scan, x: Tensor, log_decay: Tensor, B_: Tensor, C: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        return form(x, log_decay, B_, C, chunk_size, *state)[: 1 + len(state)]  # with a first state the last one too

    fast, plain = functools.partial(run, kernels.scan), functools.partial(run, ssd_chunked)

    for tokens, bias in itertools.product((length, length - 7, 5), (2.0, 0.0, -4.0, -8.0)):
        inputs = draw_scan(config, device, dtype, tokens, bias)
        errors[f"{tokens} tokens, A_log about {bias:g}"] = largest_error(fast, plain, inputs)
    ssm = config.ssm_cfg
    state = torch.randn(BATCH, ssm["n_v_heads"], config.headdim, ssm["d_state"], device=device).requires_grad_()
    inputs = [*draw_scan(config, device, dtype, length, -4.0), state]
    errors["with a first state"] = largest_error(fast, plain, inputs)
    return errors


def draw_scan(config: LlambaConfig, device: torch.device, dtype: torch.dtype, length: int, bias: float) -> list[Tensor]:
    """Draws x (B, L, H, P), log_decay (B, L, H) in float32, B_ and C (B, L, G, N). As in the mixer x, B_ and C lie in
    one tensor.
    """
    ssm = config.ssm_cfg
    log_decay = -F.softplus(torch.randn(BATCH, length, ssm["n_v_heads"], device=device) + bias)
    convolved = torch.randn(BATCH, length, config.d_xBC, device=device).to(dtype)  # (B, L, d_xBC)
    x, B_, C = convolved.split([config.d_inner, *[ssm["n_qk_heads"] * ssm["d_state"]] * 2], dim=-1)
    B_, C = (m.unflatten(-1, (ssm["n_qk_heads"], ssm["d_state"])) for m in (B_, C))
    inputs = x.unflatten(-1, (ssm["n_v_heads"], config.headdim)), log_decay, B_, C
    return [m.detach().requires_grad_() for m in inputs]


def conv_errors(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, config: LlambaConfig, length: int
) -> dict[str, float]:
    """Returns the convolution's largest error, without and with inputs before the first."""
    width, activation = config.ssm_cfg["d_conv"], config.ssm_cfg["activation"]
    inputs = draw_conv(config, device, dtype, length)
    past = torch.randn(BATCH, config.d_xBC, width, device=device).to(dtype)

    def run(form: Conv, before: Tensor | None, x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (form(x, weight, bias, activation, before),)

    return {
        case: largest_error(
            functools.partial(run, kernels.conv, before), functools.partial(run, causal_conv, before), inputs
        )
        for case, before in ((f"{length} tokens", None), ("with a past", past))
    }


def draw_conv(config: LlambaConfig, device: torch.device, dtype: torch.dtype, length: int) -> list[Tensor]:
    """Draws x (B, channels, L), laid out as the mixer has it, weight (channels, K) and bias (channels,)."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device).to(dtype)

    x = normal(BATCH, length, config.d_xBC).transpose(1, 2)
    inputs = x, normal(config.d_xBC, config.ssm_cfg["d_conv"]), normal(config.d_xBC)
    return [m.detach().requires_grad_() for m in inputs]


def mixer_errors(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, config: LlambaConfig, length: int
) -> dict[str, float]:
    """Returns the errors of a mixer's output and of the gradients of its input and weights, by name."""
    return module_errors(DiscreteMamba2(config).to(device, dtype), kernels, config, length)


def block_errors(
    kernels: Kernels, device: torch.device, dtype: torch.dtype, config: LlambaConfig, length: int
) -> dict[str, float]:
    """Returns those of a whole block, which has norms and an MLP around its mixer."""
    return module_errors(LlambaBlock(config, layer_idx=0).to(device, dtype), kernels, config, length)


def module_errors(module: nn.Module, kernels: Kernels, config: LlambaConfig, length: int) -> dict[str, float]:
    """Returns the errors of a module with one mixer in it. The rows of the projection that make A_log, few among many,
    count by themselves.
    """
    weights = dict(module.named_parameters())
    projection = next(name for name in weights if name.endswith("in_proj.weight"))
    device, dtype = weights[projection].device, weights[projection].dtype
    rows = weights.pop(projection).split([config.d_xBC, config.d_inner, config.ssm_cfg["n_v_heads"]])
    u = torch.randn(BATCH, length, config.d_model, device=device).to(dtype)  # (B, L, D)
    inputs = [m.detach().requires_grad_() for m in (u, *rows, *weights.values())]
    names = ["input", *(f"{projection} ({part})" for part in ("xBC", "z", "A_log")), *weights]

    def run(form: Kernels, u: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
        given = {projection: torch.cat(leaves[: len(rows)])} | dict(zip(weights, leaves[len(rows) :], strict=True))
        with using_kernels(form, device.type, u.dtype):
            return (functional_call(module, given, (u,)),)

    errors = errors_of(lambda *m: run(kernels, *m), lambda *m: run(plain_kernels(), *m), inputs)
    return dict(zip(["output", *(f"gradient of {name}" for name in names)], errors, strict=True))


def largest_error(fast: Form, plain: Form, inputs: list[Tensor]) -> float:
    return max(errors_of(fast, plain, inputs))


def errors_of(fast: Form, plain: Form, inputs: list[Tensor]) -> list[float]:
    """Returns the relative errors of the results and of the gradients of all inputs; infinity if one is not finite."""
    exact = [m.detach().float().requires_grad_() for m in inputs]
    truths = plain(*exact)
    d_results = [torch.randn_like(truth) for truth in truths]
    truths += torch.autograd.grad(truths, exact, d_results)
    results = fast(*inputs)
    d_results = [d.to(result.dtype) for d, result in zip(d_results, results, strict=True)]
    results += torch.autograd.grad(results, inputs, d_results)
    errors = [(one.float() - other).norm() / other.norm() for one, other in zip(results, truths, strict=True)]
    return [error if math.isfinite(error) else math.inf for error in torch.stack(errors).tolist()]
