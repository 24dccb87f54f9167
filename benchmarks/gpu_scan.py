"""The section of bench_gpu.py for blocks without their MLP's products: the scan, its convolution, a whole mixer, norms
and gates, in the layouts of training.
"""

import functools
import itertools
from collections.abc import Callable

import torch
from gpu_kernels import largest_error
from gpu_measure import PartRun, Work, compare
from torch import Tensor
from torch.func import functional_call

from llamba import LlambaConfig
from llamba.elementwise import PLAIN_ELEMENTWISE
from llamba.kernels import PLAIN, Conv, Kernels, Scan, causal_conv, kernels_for, plain_kernels, using_kernels
from llamba.mixer import DiscreteMamba2
from llamba.ssd import ssd_chunked
from preflight.checks.kernels import BATCH, LENGTH, draw_conv, draw_elementwise, draw_scan, elementwise_forms
from processes.devices import can_compile

Form = Callable[..., tuple[Tensor, ...]]
INPUT_SETS = 4  # used in turn, so that the inputs are not in the card's cache


def scan(run: PartRun) -> None:
    """Compares the plain forms with those that llamba.kernels finds, on the shapes of one mixer of an 8B student."""
    torch.manual_seed(0)
    length, config = LENGTH, LlambaConfig()
    if run.quick:
        ssm = {"d_state": 4, "n_v_heads": 4, "n_qk_heads": 2, "chunk_size": 8}
        length, config = 20, LlambaConfig(d_model=32, ssm_cfg=ssm)
    chunk_size, activation = config.ssm_cfg["chunk_size"], config.ssm_cfg["activation"]
    kernels = kernels_for(run.device.type, torch.bfloat16)

    def scan_by(form: Scan) -> Form:
        return lambda x, log_decay, B_, C: form(x, log_decay, B_, C, chunk_size)

    def conv_by(form: Conv) -> Form:
        return lambda x, weight, bias: (form(x, weight, bias, activation, None),)

    convs = {PLAIN: conv_by(causal_conv), kernels.conv_name: conv_by(kernels.conv)}
    scans = {PLAIN: scan_by(ssd_chunked), kernels.scan_name: scan_by(kernels.scan)}
    for name, forms in (("convolution", convs), ("scan", scans)):
        if len(forms) == 1:
            run.emit(name, "kernel", note="plain only: no kernel for it is installed")
    if run.device.type == "cuda" and can_compile(run.device.type) and not run.short:
        scans["compiled by torch"] = scan_by(torch.compile(ssd_chunked))
    sizes = config, run.device, torch.bfloat16, length
    compare_forms(run, "convolution", [draw_conv(*sizes) for _ in range(INPUT_SETS)], convs)
    compare_forms(run, "scan", [draw_scan(*sizes, bias=0.0) for _ in range(INPUT_SETS)], scans)
    compare_mixers(run, config, length, kernels)
    compare_elementwise(run, config, length, kernels)


def compare_mixers(run: PartRun, config: LlambaConfig, length: int, kernels: Kernels) -> None:
    """Compares whole mixers, with the layouts and copies of training."""
    mixer = DiscreteMamba2(config).to(run.device, torch.bfloat16)
    names = [name for name, _ in mixer.named_parameters()]

    def mixer_by(form: Kernels) -> Form:
        def mix(u: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
            with using_kernels(form, u.device.type, u.dtype):
                return (functional_call(mixer, dict(zip(names, weights, strict=True)), (u,)),)

        return mix

    def draw() -> list[Tensor]:
        u = torch.randn(BATCH, length, config.d_model, device=run.device, dtype=torch.bfloat16)  # (B, L, D)
        return [m.detach().clone().requires_grad_() for m in (u, *mixer.parameters())]

    forms = {PLAIN: mixer_by(plain_kernels())}
    if kernels != plain_kernels():
        forms[f"{kernels.scan_name}, {kernels.conv_name}"] = mixer_by(kernels)
    if kernels.elementwise != PLAIN_ELEMENTWISE:
        forms["the same, plain gate"] = mixer_by(kernels._replace(elementwise=PLAIN_ELEMENTWISE))
    compare_forms(run, "mixer", [draw() for _ in range(INPUT_SETS)], forms)


def compare_elementwise(run: PartRun, config: LlambaConfig, length: int, kernels: Kernels) -> None:
    """Compares norm, SwiGLU and gate with their plain forms."""
    plain, fused = (elementwise_forms(form, config) for form in (PLAIN_ELEMENTWISE, kernels.elementwise))
    sets = [draw_elementwise(config, run.device, torch.bfloat16, length) for _ in range(INPUT_SETS)]
    for name in plain:
        forms = {PLAIN: plain[name], kernels.elementwise.name: fused[name]}
        compare_forms(run, name, [inputs[name] for inputs in sets], forms)


def compare_forms(run: PartRun, name: str, input_sets: list[list[Tensor]], forms: dict[str, Form]) -> None:
    """Compares forms of an operation. The first is the plain one; in float64 it also gives the truth."""
    plain = next(iter(forms.values()))
    d_y = torch.randn_like(plain(*input_sets[0])[0])

    def forward(form: Form, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        with torch.no_grad():
            return form(*inputs)

    def forward_and_backward(form: Form, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        y = form(*inputs)[0]
        return torch.autograd.grad(y, inputs, d_y.to(y.dtype))

    exact_inputs = [m.detach().double().requires_grad_() for m in input_sets[0]]
    for title, call in (("forward", forward), ("forward and backward", forward_and_backward)):
        candidates = {
            form_name: functools.partial(in_turn, call, form, input_sets) for form_name, form in forms.items()
        }
        truth = call(plain, exact_inputs)
        compare(run, f"{name}, {title}", candidates, functools.partial(errors_of_all, truth=truth))


def in_turn(call: Callable, form: Form, input_sets: list[list[Tensor]]) -> Work:
    """Returns work that takes the next set of inputs at each call."""
    sets = itertools.cycle(input_sets)
    return lambda: call(form, next(sets))


def errors_of_all(out: tuple[Tensor, ...], truth: tuple[Tensor, ...]) -> dict[str, float]:
    return {"relative_error": largest_error(out, truth)}
