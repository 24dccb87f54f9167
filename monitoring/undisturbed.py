"""Puts a student into evaluation mode for a measurement, without an effect on the run."""

import contextlib
from collections.abc import Iterator

import torch

from llamba import LlambaForCausalLM


@contextlib.contextmanager
def undisturbed(student: LlambaForCausalLM, compiled: bool) -> Iterator[None]:
    """Puts a student that is in training into evaluation mode within the block: no dropout, no gradients, and nothing
    is compiled anew for it. Afterwards it trains as before.
    """
    student.eval()
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if compiled:
                stack.enter_context(torch.compiler.set_stance("force_eager"))
            yield
    finally:
        student.train()
