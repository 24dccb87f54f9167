"""Finds out which Triton kernels a mixer launches in training, and for which arguments Triton would compile them, on a
machine without a GPU.

The mixer runs on PyTorch's device "meta", where tensors have shapes, strides and offsets, but no memory: nothing is
computed. In place of a launch, Triton's JIT reads the arguments as it would on a GPU (types, which sizes are 1, what is
divisible by 16), and what it would compile for them is kept.
"""

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import torch

from llamba import LlambaConfig, mamba_scan
from llamba.cache import RecurrentLayer
from llamba.kernels import Kernels, Scan, causal_conv1d_conv, fla_scan, kernels_for, using_kernels
from llamba.mixer import DiscreteMamba2

DTYPE = torch.bfloat16


class Chip(NamedTuple):
    """Holds what of a GPU decides about its kernels. shared: the bytes of shared memory that one block may have (table
    "Technical Specifications per Compute Capability" of the CUDA C++ Programming Guide).
    """

    name: str
    processors: int
    shared: int


CHIPS = {
    80: Chip("A100", 108, 163 * 1024),
    89: Chip("L40S", 142, 99 * 1024),
    90: Chip("H100", 132, 227 * 1024),
    100: Chip("B200", 148, 227 * 1024),
    120: Chip("RTX 5090", 170, 99 * 1024),
}

# By preset: head width P and state size N are what the kernels differ in.
STUDENTS = {
    "llamba-8b": LlambaConfig(),  # P 128, N 64
    "llama-8b": LlambaConfig(ssm_cfg={"d_state": 128, "bias": True}),  # P 128, N 128; so has llama-3b
    "llama-1b": LlambaConfig(d_model=2048, ssm_cfg={"bias": True}),  # P 64, N 64
}


class Case(NamedTuple):
    """Describes a call of a mixer. prefill: forward only, from states that a cache holds. documents: with a document
    index of each token.
    """

    batch: int
    length: int
    prefill: bool = False
    documents: bool = False


# Triton compiles a kernel anew where an integer is 1, or not divisible by 16.
CASES = {
    "training": Case(2, 1024),
    "batch of 1": Case(1, 1024),
    "odd length": Case(2, 1001),
    "one chunk": Case(1, 45),
    "prefill": Case(2, 301, prefill=True),
    "documents": Case(2, 1024, documents=True),
}


@dataclass(frozen=True)
class Launch:
    """Holds what Triton needs to compile one configuration of a kernel for one GPU. specialization: Triton's own
    record of the types, constants, alignments and options.
    """

    module: str
    kernel: str
    target: int
    config: str
    specialization: str


def short_name(launch: Launch) -> str:
    return launch.kernel.strip("_").removesuffix("_kernel")


# The configurations among which Triton's autotuner would choose for one launch.
Choice = tuple[Launch, ...]


def launches(target: int, scan_name: str, students: list[str], cases: list[str]) -> dict[Choice, list[str]]:
    """Returns what mixers launch on a GPU of a compute capability, each choice once with the cases that need it, as
    "training of llamba-8b". scan_name: of `SCANS`.
    """
    with stand_in_gpu(target):
        scan, on_meta = SCANS[scan_name]()
    found: dict[Choice, list[str]] = {}
    with on_meta:
        for student in students:
            for case in cases:
                for choice in recorded(target, functools.partial(run_mixer, STUDENTS[student], CASES[case], scan)):
                    needs = found.setdefault(choice, [])
                    if (need := f"{case} of {student}") not in needs:
                        needs.append(need)
    return found


def mamba_ssm_scan() -> tuple[Scan, AbstractContextManager]:
    """Returns the scan that training uses on a GPU, and in which context it launches kernels on "meta". Raises
    ImportError without mamba-ssm.
    """
    chosen = kernels_for("cuda", DTYPE)
    if chosen.scan_name != "mamba-ssm":
        raise ImportError("mamba-ssm is missing or does not import; `make setup-dev` installs its Python files")
    return chosen.scan, calling_kernels(importlib.import_module("mamba_ssm.ops.triton.ssd_combined"))


def fla_core_scan() -> tuple[Scan, AbstractContextManager]:
    """Returns the scan that training uses on a GPU without mamba-ssm, and a context for it."""
    module = importlib.import_module("fla.ops.simple_gla")
    return functools.partial(fla_scan, module.chunk_simple_gla), contextlib.nullcontext()


SCANS = {"mamba-ssm": mamba_ssm_scan, "fla-core": fla_core_scan}


@contextlib.contextmanager
def calling_kernels(kernels: ModuleType) -> Iterator[None]:
    """Lets the operators that `mamba_scan` made of a module call its kernels for tensors without data too, for which
    torch.library otherwise calls their `register_fake` forms.
    """
    namespace = re.sub(r"\W", "_", mamba_scan.__name__)
    operators = torch._library.custom_ops.OPDEFS
    forward, backward = (operators[f"{namespace}::mamba_scan{name}"] for name in ("", "_backward"))
    with (
        mock.patch.object(forward, "_abstract_fn", functools.partial(mamba_scan._forward, kernels)),
        mock.patch.object(backward, "_abstract_fn", functools.partial(mamba_scan._backward, kernels)),
    ):
        yield


def run_mixer(config: LlambaConfig, case: Case, scan: Scan) -> None:
    """Runs a mixer forward, and backward unless it is a prefill, without data."""
    batch, length = case.batch, case.length
    with torch.device("meta"):
        mixer = DiscreteMamba2(config).to(DTYPE)
        u = torch.empty(batch, length, config.d_model, dtype=DTYPE, requires_grad=not case.prefill)
        seq_idx = torch.empty(batch, length, dtype=torch.int32) if case.documents else None
        cache = None
        if case.prefill:
            cache = RecurrentLayer()
            state = torch.empty(batch, mixer.n_v_heads, mixer.headdim, mixer.d_state)
            cache.update_states(torch.empty(batch, mixer.d_xBC, mixer.d_conv, dtype=DTYPE), state, 1)
    # The result of causal-conv1d lies in memory as its input does; so does a product with one number per channel.
    conv = functools.partial(causal_conv1d_conv, lambda x, weight, bias, activation: x * weight[:, :1])
    kernels = Kernels("on meta", scan, "as causal-conv1d", conv)
    with using_kernels(kernels, "meta", DTYPE), torch.set_grad_enabled(not case.prefill):
        y = mixer(u, cache, seq_idx=seq_idx)
        if not case.prefill:
            y.backward(torch.empty_like(y))


def recorded(target: int, work: Callable[[], None]) -> list[Choice]:
    """Returns what `work` launches for a GPU of a compute capability, in order."""
    from triton import knobs
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.jit import JITFunction

    reader = LaunchReader(target, JITFunction.run)
    with (
        stand_in_gpu(target),
        mock.patch.object(Autotuner, "run", lambda tuner, *args, **kwargs: reader.read_tuned(tuner, args, kwargs)),
        mock.patch.object(JITFunction, "run", lambda kernel, *args, **kwargs: reader.read(kernel, args, kwargs)),
        mock.patch.object(knobs.runtime, "jit_cache_hook", reader.keep),
    ):
        work()
    return reader.choices


class LaunchReader:
    """Reads launches in place of Triton, which would compile and run them. run: `JITFunction.run` itself."""

    def __init__(self, target: int, run: Callable[..., Any]) -> None:
        self.target, self.run = target, run
        self.choices: list[Choice] = []
        self.config = ""
        self.read_so_far: list[Launch] = []

    def read_tuned(self, tuner: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Reads a launch in every configuration that the autotuner would try."""
        tuner.nargs = dict(zip(tuner.arg_names, args, strict=False))
        configs = tuner.prune_configs(kwargs)
        for config in configs:
            self.config = ", ".join(f"{name} {value}" for name, value in config.all_kwargs().items())
            tuner.fn.run(*args, **kwargs, **config.all_kwargs())
        tuner.best_config, self.config = configs[0], ""  # callers of some kernels ask for the best one
        self._end_of_choice()

    def read(self, kernel: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        """Reads one configuration of a launch, or the launch of a kernel that has no others."""
        self.run(kernel, *args, **{**kwargs, "warmup": True})  # which needs no grid, and calls `keep`
        if not self.config:
            self._end_of_choice()

    def keep(self, *, fn: Any, compile: dict[str, Any], **_: Any) -> bool:
        """Keeps what Triton is about to compile. Returns True, which stops it."""
        launch = Launch(fn.module, fn.name, self.target, self.config, compile["specialization_data"])
        self.read_so_far.append(launch)
        return True

    def _end_of_choice(self) -> None:
        self.choices.append(tuple(self.read_so_far))
        self.read_so_far = []


@contextlib.contextmanager
def stand_in_gpu(target: int) -> Iterator[None]:
    """Answers what PyTorch and Triton are asked about the GPU."""
    chip = CHIPS[target]
    properties = SimpleNamespace(
        name=chip.name,
        major=target // 10,
        minor=target % 10,
        multi_processor_count=chip.processors,
        regs_per_multiprocessor=2**16,
        max_threads_per_multi_processor=2048,
        max_threads_per_block=1024,
        warp_size=32,
    )
    stand_in_driver(target)
    with (
        mock.patch.object(torch.cuda, "device", contextlib.nullcontext),
        mock.patch.object(torch.cuda, "current_device", lambda: 0),
        mock.patch.object(torch.cuda, "get_device_name", lambda device=None: chip.name),
        mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(target, 10)),
        mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties),
    ):
        yield


def stand_in_driver(target: int) -> None:
    """Gives Triton a driver that knows of one GPU, whose number is its compute capability: Triton keeps what it knows
    of a kernel by the number of the GPU.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    driver.set_active(
        SimpleNamespace(
            get_current_device=lambda: target,
            get_current_stream=lambda device: 0,
            get_current_target=lambda: GPUTarget("cuda", target, 32),
        )
    )
