"""The one place where optional CUDA packages are imported: fast forms of the scan and of the causal convolution,
chosen per device at run time, each with the plain form's arguments and results.

Scan: mamba-ssm's Triton kernels, else flash-linear-attention's simple_gla (fla-core), else `plain_scan`.
Convolution: causal-conv1d, else PyTorch's own.
"""

import functools
import importlib
import importlib.util
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import NamedTuple

import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .mamba_scan import NEEDED, mamba_scan
from .ssd import ssd_chunked

logger = logging.getLogger("llamba")

# The errors of importing a package whose compiled part is missing or built for another torch.
BROKEN = (ImportError, OSError, RuntimeError)

Scan = Callable[..., tuple[Tensor, Tensor]]
Conv = Callable[..., Tensor]


class Kernels(NamedTuple):
    """Holds the scan and the convolution for a device, with their names for the log."""

    scan_name: str
    scan: Scan
    conv_name: str
    conv: Conv


PLAIN = "plain PyTorch"
_chosen: dict[tuple[str, torch.dtype], Kernels] = {}


def kernels_for(device_type: str, dtype: torch.dtype) -> Kernels:
    """Returns this machine's fastest kernels for tensors on `device_type` ("cuda", "cpu"), and logs their names."""
    key = (device_type, dtype)
    if key not in _chosen:  # a plain dictionary: torch.compile looks into it, and not through functools.cache
        _chosen[key] = _choose(device_type, dtype)
    return _chosen[key]


@contextmanager
def using_kernels(kernels: Kernels, device_type: str, dtype: torch.dtype) -> Iterator[None]:
    """Runs mixers of a device and dtype by `kernels` within the block, to compare them with what would be chosen."""
    before = kernels_for(device_type, dtype)
    _chosen[device_type, dtype] = kernels
    try:
        yield
    finally:
        _chosen[device_type, dtype] = before


def plain_kernels() -> Kernels:
    return Kernels(PLAIN, plain_scan, PLAIN, causal_conv)


def _choose(device_type: str, dtype: torch.dtype) -> Kernels:
    scan_name, scan, conv_name, conv = plain_kernels()
    if device_type == "cuda":
        # mamba-ssm keeps states and their gradients in the dtype of x, and they can leave float16's range.
        if dtype in (torch.bfloat16, torch.float32) and (module := _mamba_ssm_triton()):
            scan_name, scan = "mamba-ssm", mamba_scan(module)
        elif dtype != torch.float64 and (module := _fla_simple_gla()):
            scan_name, scan = "flash-linear-attention", functools.partial(fla_scan, module.chunk_simple_gla)
        if dtype != torch.float64 and (module := _optional("causal_conv1d")):
            conv_name, conv = "causal-conv1d", functools.partial(causal_conv1d_conv, module.causal_conv1d_fn)
    logger.info("%s %s: scan by %s, convolution by %s", device_type, dtype, scan_name, conv_name)
    return Kernels(scan_name, scan, conv_name, conv)


def plain_scan(*inputs, **states) -> tuple[Tensor, Tensor]:
    """Runs `ssd_chunked` and keeps only its inputs for backward. Its decays and scores, a chunk wide for every token
    and head, would take more memory than the rest of a block, and are cheap to recompute.
    """
    if not torch.is_grad_enabled():
        return ssd_chunked(*inputs, **states)
    return checkpoint(ssd_chunked, *inputs, **states, use_reentrant=False, preserve_rng_state=False)


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, past: Tensor | None) -> Tensor:
    """Returns the depthwise causal convolution (B, channels, L) of x (B, channels, L) by weight (channels, width).
    past (B, channels, width): the inputs before x, zeros if None.
    """
    width = weight.shape[1]
    if past is None:
        x = F.pad(x, (width - 1, 0))
    else:
        x = torch.cat([past[..., past.shape[-1] - width + 1 :].to(x.dtype), x], dim=-1)
    y = F.conv1d(x, weight[:, None], bias, groups=x.shape[1])
    return y if activation == "identity" else F.silu(y)


def causal_conv1d_conv(
    causal_conv1d_fn: Callable,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str,
    past: Tensor | None,
) -> Tensor:
    """Computes `causal_conv` by causal-conv1d, which has widths of 2 to 4; others take the plain form. The past is
    concatenated in front, because the kernel's own initial states need a channel-last layout. y has the layout of x.
    """
    width = weight.shape[1]
    if not 2 <= width <= 4:
        return causal_conv(x, weight, bias, activation, past)
    n_past = 0
    if past is not None:
        n_past = width - 1
        x = torch.cat([past[..., past.shape[-1] - n_past :].to(x.dtype), x], dim=-1)
    if not _is_channel_last(x):
        x = x.contiguous()
    y = causal_conv1d_fn(x, weight, bias, activation=None if activation == "identity" else "silu")
    return y[..., n_past:]


def _is_channel_last(x: Tensor) -> bool:
    """Returns whether causal-conv1d takes x (B, channels, L) as a view of (B, L, channels), as the mixer has it: its
    loads are of 8 channels each (the checks of csrc/causal_conv1d.cpp, 1.6.1).
    """
    batch, channel, token = x.stride()
    return channel == 1 and all(n % 8 == 0 for n in (x.shape[1], batch, token, x.storage_offset()))


def fla_scan(
    chunk_simple_gla: Callable,
    x: Tensor,
    log_decay: Tensor,
    B_: Tensor,
    C: Tensor,
    chunk_size: int,
    initial_state: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Computes `ssd_chunked` by flash-linear-attention: queries C, keys B, values x, state (B, H, N, P). It has no
    document index for a batch, so packed documents take the plain form.
    """
    if seq_idx is not None:
        return plain_scan(x, log_decay, B_, C, chunk_size, initial_state, seq_idx)
    repeats = x.shape[2] // B_.shape[2]
    keys, queries = (m.repeat_interleave(repeats, dim=2) for m in (B_, C))  # (B, L, H, N)
    y, state = chunk_simple_gla(
        q=queries,
        k=keys,
        v=x,
        g=log_decay.float(),
        scale=1.0,
        initial_state=None if initial_state is None else initial_state.float().transpose(-1, -2).contiguous(),
        output_final_state=True,
    )
    return y.to(x.dtype), state.transpose(-1, -2)


def _optional(name: str) -> ModuleType | None:
    """Returns the module, or None where it cannot be imported; a broken installation is logged as a warning."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name == "fla.ops":
            logger.warning("flash-linear-attention is installed without its kernels: pip install --no-deps fla-core")
        elif error.name != name.split(".")[0]:
            logger.warning("%s is installed but does not import: %s", name, error)
    except BROKEN as error:
        logger.warning("%s is installed but does not import: %s", name, error)
    return None


def _fla_simple_gla() -> ModuleType | None:
    """Returns the module of flash-linear-attention's scan, or None where it is missing or its backward pass is wrong:
    Triton from 3.4 to before 3.7.1 compiles it wrongly for Hopper (fla's issue 640). From 0.5.0 on it raises there.
    """
    module = _optional("fla.ops.simple_gla")
    if module is None:
        return None
    capability, triton = torch.cuda.get_device_capability(), importlib.import_module("triton").__version__
    if capability[0] == 9 and Version("3.4") <= Version(triton) < Version("3.7.1"):
        logger.warning(
            "flash-linear-attention is not used: its backward pass is wrong on compute capability %d.%d with Triton %s "
            "(from 3.4 to before 3.7.1)",
            *capability,
            triton,
        )
        return None
    return module


def _mamba_ssm_triton() -> ModuleType | None:
    """Returns the module of mamba-ssm's Triton scan, or None. `import mamba_ssm` itself fails where its compiled
    selective scan is missing or built for another torch. The Triton scan does not need it and is then imported under
    an empty package of that name.
    """
    spec = importlib.util.find_spec("mamba_ssm")
    if spec is None or spec.submodule_search_locations is None:
        return None
    try:
        importlib.import_module("mamba_ssm")
    except BROKEN as error:
        logger.info("import mamba_ssm fails (%s); using its Triton scan alone", error)
        sys.modules["mamba_ssm"] = importlib.util.module_from_spec(spec)
    # Or every process would time some hundred forms of the kernels again, for minutes, and a resumed run could choose
    # others than before, with other last bits.
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")
    module = _optional("mamba_ssm.ops.triton.ssd_combined")
    if module is not None and (missing := sorted(NEEDED - vars(module).keys())):
        logger.warning("mamba-ssm is not used: this version of its scan has no %s", ", ".join(missing))
        return None
    return module
