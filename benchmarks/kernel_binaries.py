"""Compiles Triton kernels for GPUs that are not there, and reads from the assembler's log what they take.

Registers and spilled bytes are those of one thread: what a thread spills it keeps in local memory, which is the GPU's
main memory behind a cache. Shared memory is that of one block.
"""

import contextlib
import importlib
import io
import multiprocessing
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any
from unittest import mock

from kernel_launches import CHIPS, Choice, Launch, stand_in_driver

# What a kernel multiplies matrices by, the fastest first.
PRODUCTS = {"tcgen05.mma": "tcgen05", "wgmma.mma_async": "wgmma", "mma.sync": "mma"}
TENSOR_MEMORY = 512  # columns that a block may have, on GPUs that have it


@dataclass(frozen=True)
class Binary:
    """Holds what one compiled configuration takes, or in `error` why it was not compiled. serialized: whether each
    product of matrices waits for the one before.
    """

    launch: Launch
    seconds: float
    registers: int = 0
    spilled: int = 0  # bytes
    shared: int = 0  # bytes
    products: str = ""
    serialized: bool = False
    error: str = ""

    @property
    def fits(self) -> bool:
        return not self.error and self.shared <= CHIPS[self.launch.target].shared


def read_log(log: str) -> dict[str, int]:
    """Returns what `ptxas -v` prints about a kernel: its registers, the bytes that it stores as spilled, and whether
    its products are serialized. Raises ValueError where the log does not say.
    """
    registers, spilled = re.search(r"Used (\d+) registers", log), re.search(r"(\d+) bytes spill stores", log)
    if registers is None or spilled is None:
        raise ValueError(f"ptxas does not say how many registers it used: {log[-300:]!r}")
    return {"registers": int(registers[1]), "spilled": int(spilled[1]), "serialized": "are serialized due to" in log}


def products_of(ptx: str) -> str:
    """Returns which instruction multiplies matrices, or nothing if none does."""
    return next((name for instruction, name in PRODUCTS.items() if instruction in ptx), "")


def compile_launch(launch: Launch) -> Binary:
    """Compiles one configuration of a kernel."""
    stand_in_driver(launch.target)
    function: Any = vars(importlib.import_module(launch.module))[launch.kernel]
    while not hasattr(function, "preload"):  # the kernel is inside an autotuner, or more
        function = function.fn
    return compile_logged(launch, lambda: function.preload(launch.specialization))


def compile_logged(launch: Launch, compile: Callable[[], Any]) -> Binary:
    """Returns what a kernel takes that `compile` has Triton compile. The environment is that of `empty_cache`."""
    start = time.perf_counter()
    log = io.StringIO()
    try:
        with contextlib.redirect_stdout(log):
            kernel = compile()
    except Exception as error:  # of the compiler's front end, of LLVM or of ptxas, whose errors have no common class
        return Binary(launch, time.perf_counter() - start, error=first_lines(error))
    seconds = time.perf_counter() - start
    columns = kernel.metadata.tmem_size or 0
    if columns > TENSOR_MEMORY:
        return Binary(launch, seconds, error=f"{columns} columns of tensor memory, {TENSOR_MEMORY} are there")
    return Binary(
        launch,
        seconds,
        shared=kernel.metadata.shared,
        products=products_of(kernel.asm["ptx"]),
        **read_log(log.getvalue()),
    )


def first_lines(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:300]


def compile_choice(choice: Choice, every: bool) -> list[Binary]:
    """Compiles every configuration of a launch, or those up to the first that fits and spills nothing."""
    binaries = []
    for launch in choice:
        binaries.append(compile_launch(launch))
        if not every and binaries[-1].fits and not binaries[-1].spilled:
            break
    return binaries


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """Has Triton keep nothing, and print the assembler's log. What it finds in a cache it does not assemble again."""
    with (
        tempfile.TemporaryDirectory(prefix="check-kernels-") as cache,
        mock.patch.dict(os.environ, {"TRITON_CACHE_DIR": cache, "TRITON_DUMP_PTXAS_LOG": "1"}),
    ):
        yield


def compile_all(
    jobs: Iterable[tuple[Choice, bool]], processes: int, show: Callable[[list[Binary]], None]
) -> list[list[Binary]]:
    """Compiles launches in some processes: (choice, whether every configuration). Calls `show` as results arrive. The
    processes are forks of this one, which has imported the kernels.
    """
    tried = []
    with empty_cache(), ProcessPoolExecutor(processes, mp_context=multiprocessing.get_context("fork")) as pool:
        for future in [pool.submit(compile_choice, choice, every) for choice, every in jobs]:
            tried.append(future.result())
            show(tried[-1])
    return tried
