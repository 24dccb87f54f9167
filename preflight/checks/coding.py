"""The check of doctor.py for what codes gradients and weights on their way (`--gradient_exchange owners`): whether it
is compiled on this GPU, with the bits of the plain form.
"""

from collections.abc import Iterator

import torch

from distillation.owners import coding_kernels
from model_utils import DTYPES
from preflight.checks.basics import OK, WARNING, Finding, PlannedRun
from preflight.checks.machine import run_device

NAME = "coding of gradients and weights"


def check_coding(run: PlannedRun) -> Iterator[Finding]:
    """Checks what a run with these options uses; nothing, if its ranks exchange in another way."""
    if run.args.gradient_exchange == "owners":
        dtype = DTYPES[run.args.dtype]
        yield judge_coding(run_device(), {run.args.gradient_bits}, [dtype])


def judge_coding(device: torch.device, bits: set[int], dtypes: list[torch.dtype]) -> Finding:
    """Returns the finding on the coding of gradients of these bits, and of what changes in weights of these dtypes."""
    if device.type == "cpu":
        return Finding(OK, NAME, "plain PyTorch, as always on a CPU")
    kernels = {kernel for n in bits for dtype in dtypes for kernel in coding_kernels(n, dtype, dtype)}
    against = {function.title: reason for function, read in kernels if (reason := function.why_plain(device, read))}
    if not against:
        return Finding(OK, NAME, f"{len(kernels)} functions compiled, each with the bits of its plain form")
    found = "; ".join(f"{title}: {reason}" for title, reason in sorted(against.items()))
    return Finding(WARNING, NAME, f"plain PyTorch, which is right but slower, for {found}", "install another torch")
