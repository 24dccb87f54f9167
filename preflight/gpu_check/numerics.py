"""Does this GPU compute what it should? The checks of the part `first` that need tensors, one in a process:

    python -m preflight.gpu_check.numerics mixer

Without a GPU the same code runs at a small size.
"""

import sys
from collections.abc import Iterator

import torch

from arguments import parse_train_args
from distillation.fused_loss import add_product
from llamba import LlambaConfig
from llamba.kernels import kernels_for, plain_kernels
from preflight.checks.basics import FAILURE, OK, WARNING, Finding, PlannedRun, run_check
from preflight.checks.coding import judge_coding
from preflight.checks.kernels import LENGTH, TOLERANCE, block_errors, draw_scan, mixer_errors, scan_errors
from preflight.checks.machine import run_device
from preflight.gpu_check.children import emit
from preflight.gpu_check.results import NOT_APPLICABLE, Result, table

DTYPE = torch.bfloat16
# How many times the error of the plain form in the same dtype a kernel's may be before it is more than rounding; errors
# below the second figure are never more: a dtype's last bit is 0.4%.
MANY_TIMES, LAST_BIT = 3.0, 0.004
PRODUCT_TOLERANCE = 1e-5  # float32 totals of 300 products of bfloat16 factors, which float32 has exactly


def case() -> tuple[torch.device, LlambaConfig, int]:
    """Returns the device, a student's shapes and a length: those of training, or small ones on a CPU."""
    device = run_device()
    if device.type == "cuda":
        return device, LlambaConfig(), LENGTH
    small = {"n_v_heads": 4, "n_qk_heads": 4, "d_state": 8, "chunk_size": 16}
    return device, LlambaConfig(d_model=64, ssm_cfg=small), 64


def check_products(run: PlannedRun) -> Iterator[Finding]:
    """Checks products of 16-bit factors that are added to float32 totals in place, as the loss sums gradients."""
    device = run_device()
    torch.manual_seed(0)
    total = torch.randn(4096, 512, device=device)
    a, b = torch.randn(300, 4096, device=device).to(DTYPE), torch.randn(300, 512, device=device).to(DTYPE)
    truth, place = total.double() + a.T.double() @ b.double(), total.data_ptr()
    add_product(total, a.T, b)
    error = ((total.double() - truth).norm() / truth.norm()).item()
    name, found = "products of bfloat16 into float32 totals", f"differ by {error:.2g} from float64"
    if total.data_ptr() != place or not error <= PRODUCT_TOLERANCE:
        found += f", {PRODUCT_TOLERANCE:g} is allowed"
        yield Finding(FAILURE, name, found, "distillation/fused_loss.py, add_product: this torch's addmm(out_dtype=)")
    else:
        yield Finding(OK, name, f"{found}, in place")


def check_mixer(run: PlannedRun) -> Iterator[Finding]:
    """Checks a whole mixer in the layouts of training, its output and every gradient."""
    yield compare("mixer", mixer_errors)


def check_block(run: PlannedRun) -> Iterator[Finding]:
    """Checks a whole block: norms and an MLP around a mixer."""
    yield compare("block", block_errors)


def check_scan(run: PlannedRun) -> Iterator[Finding]:
    """Checks the scan alone: heads that forget slowly, lengths that fill their chunks or not, a first state."""
    yield compare("scan", scan_errors)


def compare(name: str, errors_of) -> Finding:
    """Returns the finding on the chosen kernels' errors beside those of the plain forms in the same dtype, both against
    the plain forms in float32. errors_of: `mixer_errors` or one like it.
    """
    device, config, length = case()
    kernels, plain = kernels_for(device.type, DTYPE), plain_kernels()
    errors = []
    for forms in (kernels, plain):
        torch.manual_seed(0)  # the same inputs for both
        errors.append(errors_of(forms, device, DTYPE, config, length))
    by_kernels, by_plain = errors
    chosen = f"scan by {kernels.scan_name}, convolution by {kernels.conv_name}, norms and gates by "
    chosen += kernels.elementwise.name
    rows = [[item, f"{error:.2g}", f"{by_plain[item]:.2g}"] for item, error in by_kernels.items()]
    figures = table(["relative error in bfloat16", chosen, "plain forms"], rows)
    worst = max(by_kernels, key=by_kernels.__getitem__)
    found = f"{chosen}: differs by up to {by_kernels[worst]:.2g} from the plain form in float32 ({worst})"
    if by_kernels[worst] > TOLERANCE[DTYPE]:
        remedy = (
            "uninstall that kernel's package and run this again: if the plain form is right, the kernel is wrong on "
        )
        remedy += "this GPU (llamba/kernels.py chooses it)"
        return Result(FAILURE, name, f"{found}, {TOLERANCE[DTYPE]:g} is allowed", remedy, figures, figures)
    excess = {item: error / by_plain[item] for item, error in by_kernels.items() if error > LAST_BIT}
    if excess and max(excess.values()) > MANY_TIMES:
        item = max(excess, key=excess.__getitem__)
        remedy = "the table in the report: does one gradient lose its bits? (llamba/mamba_scan.py)"
        found = f"{found}; {item} {excess[item]:.1f} times as much as by rounding in the plain form"
        return Result(WARNING, name, found, remedy, figures, figures)
    return Result(OK, name, found, figures=figures)


def check_operators(run: PlannedRun) -> Iterator[Finding]:
    """Checks the scan's operator as torch.compile sees it: its schema, its shapes without data, and its gradients."""
    device, config, _ = case()
    kernels = kernels_for(device.type, DTYPE)
    if kernels.scan_name != "mamba-ssm":
        yield Finding(NOT_APPLICABLE, "operators", f"the scan is by {kernels.scan_name}, which is no operator of ours")
        return
    torch.manual_seed(0)
    chunk_size = config.ssm_cfg["chunk_size"]
    inputs = draw_scan(config, device, DTYPE, chunk_size + 1, bias=0.0)
    x, B_ = inputs[0], inputs[2]
    batch, _, n_heads, headdim = x.shape
    state = torch.randn(batch, n_heads, headdim, B_.shape[-1], device=device).requires_grad_()
    for title, first in (("", None), (" with a first state", state)):
        torch.library.opcheck(torch.ops.llamba_mamba_scan.mamba_scan.default, (*inputs, chunk_size, first, None))
        yield Finding(OK, f"operator of the scan{title}", "passes torch.library.opcheck")


def check_coding(run: PlannedRun) -> Iterator[Finding]:
    """Checks the coding of gradients in every number of bits, and of what changes in weights."""
    yield judge_coding(run_device(), {16, 8, 4}, [torch.float32, DTYPE])


CHECKS = {
    "products": check_products,
    "mixer": check_mixer,
    "block": check_block,
    "scan": check_scan,
    "operators": check_operators,
    "coding": check_coding,
}


def main(name: str) -> None:
    for finding in run_check(name, CHECKS[name], PlannedRun(parse_train_args(["--preset", "tiny"]))):
        emit(finding)


if __name__ == "__main__":
    main(sys.argv[1])
