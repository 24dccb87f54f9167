"""Shows which Triton kernels torch.compile makes of the loss, norms and gates for a GPU that need not be here, what
they read and write, and what they take.

    make check-kernels
    PYTHONPATH=.:.venv/triton python benchmarks/compiled_code.py --target 100 --code runs/code

A function is traced on the CPU, with tensors that have no data. Its graph is moved to "cuda", and Inductor makes code
of it as it would for that GPU; Triton compiles the code's kernels ahead of time. Nothing is run. `read` and `written`
are the bytes of large tensors, each as often as the kernels touch it; `buffers` are what is allocated beside the
inputs. A large buffer of float32 means that kernels pass on, through memory, what one kernel could keep in registers:
that is an error, and the exit code is 1.
"""

import argparse
import contextlib
import functools
import importlib.util
import math
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock
from warnings import catch_warnings, filterwarnings

import torch
from harness import Row, print_table
from kernel_binaries import Binary, compile_logged, empty_cache
from kernel_launches import CHIPS, Launch, stand_in_gpu
from kernel_report import problems_of, remarks_of, table_of
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from distillation import changes, gradient_codes
from distillation.fused_loss import _chunk_losses_to_fuse
from distillation.losses import LossWeights
from distillation.owners import BUCKET_BYTES
from llamba import LlambaConfig, elementwise

TOKENS, VOCAB = 1024, 128256  # a chunk of an 8B student on a GPU, by `choose_chunk_tokens`
LOSSES = {
    "loss": (True, LossWeights(0.5, 0.5, 1.0)),
    "loss at temperature 2": (True, LossWeights(0.5, 0.5, 2.0)),
    "CE alone": (False, LossWeights(1.0, 0.0, 1.0)),
}


class Case(NamedTuple):
    """Holds a function that training compiles, with arguments without data. least: the numbers from which on a tensor
    is large.
    """

    function: Callable
    inputs: tuple[Any, ...]
    least: int


class Traffic(NamedTuple):
    """Counts the kernels of some code, and the bytes of large tensors. buffers: by dtype."""

    kernels: int
    read: int
    written: int
    buffers: dict[str, int]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", type=int, choices=CHIPS, default=90, metavar="N", help="compute capability")
    parser.add_argument("--code", metavar="FOLDER", type=Path, help="write the code to files of this folder")
    options = parser.parse_args()
    if importlib.util.find_spec("triton") is None:
        sys.exit("Triton is not installed here; `make check-kernels` installs one for these scripts alone")
    rows: list[Row] = []
    tried: list[list[Binary]] = []
    for name, case in cases().items():
        code = triton_code(case.function, case.inputs, options.target)
        if options.code is not None:
            options.code.mkdir(parents=True, exist_ok=True)
            (options.code / f"{name.replace(' ', '-')}.py").write_text(code)
        tried += binaries_of(code, name, options.target)
        rows.append(row_of(name, options.target, traffic_of(code, case.least)))
    print(f"torch {torch.__version__}, Triton {version('triton')}, {time.strftime('%Y-%m-%d')}\n")
    print_table(rows)
    print("", *table_of(tried), sep="\n")
    problems = [*wasted(rows), *problems_of(tried)]
    print("", *remarks_of(tried), *problems, sep="\n")
    return 1 if problems else 0


def cases() -> dict[str, Case]:
    """Returns what training compiles, in the shapes of an 8B student's."""
    losses = {
        name: Case(_chunk_losses_to_fuse, chunk_inputs(has_teacher, weights), TOKENS * VOCAB)
        for name, (has_teacher, weights) in LOSSES.items()
    }
    return losses | elementwise_cases(LlambaConfig()) | coding_cases()


def coding_cases(n: int = BUCKET_BYTES // 4) -> dict[str, Case]:
    """Returns what is compiled of the coding between two ranks, for their pieces of n weights."""
    with FakeTensorMode():
        old, new = torch.empty(n, dtype=torch.int16), torch.empty(n, dtype=torch.int16)
        gradients = torch.empty(2, n // 128, 128, dtype=torch.bfloat16)
        fours, inverse = gradients.view(2, -1, 32), [torch.empty(2, n // block) for block in (128, 32)]
        return {
            "changes, counted": Case(changes._plain_count, (old, new), n),
            "changes": Case(changes._plain_codes, (old, new), n // 4),
            "changes, applied": Case(changes._plain_stepped, (old, torch.empty(n // 4, dtype=torch.uint8)), n // 4),
            "scale of gradients": Case(gradient_codes._plain_largest, (gradients,), n),
            "gradients in 8 bits": Case(gradient_codes._plain_rounded_8, (gradients, inverse[0]), n),
            "gradients in 4 bits": Case(gradient_codes._plain_rounded_4, (fours, inverse[1]), n),
        }


def elementwise_cases(config: LlambaConfig, batch: int = 2, length: int = 1024) -> dict[str, Case]:
    """Returns the compiled forms of norm, SwiGLU and gate, and their gradients, in the layouts of a block."""
    d_inner, heads, width = config.d_inner, config.ssm_cfg["n_v_heads"], config.mlp_cfg["intermediate_size"]

    def draw(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.bfloat16)

    with FakeTensorMode():
        # z is a part of the first projection's result, and x one of the convolution's.
        z = draw(batch, length, config.d_xBC + d_inner + heads)[..., config.d_xBC : -heads]
        x = draw(batch, length, config.d_xBC)[..., :d_inner].unflatten(-1, (heads, config.headdim))
        gated = (draw(*x.shape), x, draw(heads), z, draw(d_inner))
        inner, u = [draw(batch, length, width) for _ in range(3)], draw(batch, length, config.d_model)
        norm = functools.partial(elementwise.one_rounding_rms_norm, eps=config.norm_epsilon)
        return {
            "norm": Case(norm, (u, draw(config.d_model)), u.numel()),
            "SwiGLU": Case(elementwise.one_rounding_swiglu, tuple(inner[:2]), inner[0].numel()),
            "SwiGLU, backward": Case(elementwise.swiglu_gradients, tuple(inner), inner[0].numel()),
            "gate": Case(elementwise.one_rounding_gate, gated, z.numel()),
            "gate, backward": Case(elementwise.gate_gradients, (draw(*z.shape), *gated), z.numel()),
        }


def chunk_inputs(has_teacher: bool, weights: LossWeights) -> tuple[Any, ...]:
    """Returns the arguments of the loss of one chunk."""
    with FakeTensorMode():
        logits = torch.empty(TOKENS, VOCAB, dtype=torch.bfloat16)
        teacher = torch.empty_like(logits) if has_teacher else None
        labels, mask = torch.empty(TOKENS, dtype=torch.long), torch.empty(TOKENS, dtype=torch.bool)
        return logits, teacher, labels, torch.empty(TOKENS), mask, weights


def row_of(name: str, target: int, traffic: Traffic) -> Row:
    buffers = ", ".join(f"{size / 1e9:.2f} {dtype}" for dtype, size in traffic.buffers.items())
    return {
        "case": name,
        "candidate": CHIPS[target].name,
        "kernels": traffic.kernels,
        "read, GB": round(traffic.read / 1e9, 2),
        "written, GB": round(traffic.written / 1e9, 2),
        "buffers, GB": buffers or None,
    }


def wasted(rows: list[Row]) -> Iterator[str]:
    """Yields an error for each case that writes large tensors in float32."""
    for row in rows:
        if "float32" in (row["buffers, GB"] or ""):
            yield (
                f"error: {row['case']}: {row['buffers, GB']} is written, which kernels that are fused would keep in "
                "registers; `--code FOLDER` shows between which two kernels it travels"
            )


def triton_code(function: Callable, inputs: tuple[Any, ...], target: int) -> str:
    """Returns Inductor's code of a function of fake tensors on the CPU as it would be for a GPU. All its tensors are
    taken to be on the GPU.
    """
    from torch._inductor import compile_fx, config
    from torch._inductor.graph import GraphLowering

    code: list[str] = []

    def of_tensors(*given: Tensor) -> Any:
        rest = iter(given)
        return function(*(next(rest) if isinstance(m, Tensor) else m for m in inputs))

    def compile_moved(graph: torch.fx.GraphModule, given: list, **kwargs: Any) -> Any:
        return compile_fx.compile_fx_inner(graph, moved(graph, given), **kwargs)

    def keep_code(lowering: GraphLowering) -> SimpleNamespace:
        """Stands in for `compile_to_module`, which would have Triton and a C compiler work on the code."""
        code.append(lowering.codegen()[0].value)
        return SimpleNamespace(call=None)

    tensors = [m for m in inputs if isinstance(m, Tensor)]
    with (
        tensors[0].fake_mode,
        absent_gpu(target),
        config.patch({"compile_threads": 1, "fx_graph_cache": False}),
        mock.patch.object(GraphLowering, "compile_to_module", keep_code),
        catch_warnings(),
    ):
        filterwarnings("ignore", "Accessing the data pointer of FakeTensor")  # Inductor asks where its inputs lie
        compile_fx.compile_fx(make_fx(of_tensors)(*tensors), tensors, inner_compile=compile_moved)
    return code[0]


def moved(graph: torch.fx.GraphModule, given: list) -> list:
    """Moves a graph and what its nodes know of their results to a GPU, and returns its inputs there."""
    from torch.fx.passes.fake_tensor_prop import FakeTensorProp

    device = torch.device("cuda:0")
    mode = next(m.fake_mode for m in given if isinstance(m, Tensor))
    for node in graph.graph.nodes:
        if node.kwargs.get("device") is not None:
            node.update_kwarg("device", device)
    graph.recompile()
    with mode:
        there = [
            torch.empty_strided(m.shape, m.stride(), dtype=m.dtype, device=device) if isinstance(m, Tensor) else m
            for m in given
        ]
        FakeTensorProp(graph, mode).propagate(*there)
    return there


@contextlib.contextmanager
def absent_gpu(target: int) -> Iterator[None]:
    """Answers what Inductor asks of a GPU."""
    from torch._dynamo import device_interface

    class AbsentGpu(device_interface.CudaInterface):
        class Worker(device_interface.CudaInterface.Worker):
            current_device = staticmethod(lambda: 0)
            get_device_properties = staticmethod(lambda device=None: torch.cuda.get_device_properties(device))

        current_device = staticmethod(lambda: 0)
        get_device_properties = staticmethod(lambda device=None: torch.cuda.get_device_properties(device))
        is_available = staticmethod(lambda: True)
        is_bf16_supported = staticmethod(lambda including_emulation=False: True)

    device_interface.get_interface_for_device("cuda")  # fills the table
    with stand_in_gpu(target), mock.patch.dict(device_interface.device_interfaces, {"cuda": AbsentGpu}):
        yield


def traffic_of(code: str, least: int) -> Traffic:
    """Returns what Inductor's code reads and writes of tensors of at least `least` numbers."""
    sizes: dict[str, int] = {}  # bytes, of large tensors
    buffers: dict[str, int] = {}
    parameters = {name: names.split(", ") for name, names in re.findall(r"^def (triton_\w+)\((.*)\):", code, re.M)}
    bodies = dict(re.findall(r"^def (triton_\w+)\([^\n]*\):\n(.*?)^'''", code, re.M | re.S))
    inputs = re.findall(r"(\w+) = rand_strided\(\(([\d, ]*)\), .*dtype=torch\.(\w+)\)", code)
    made = re.findall(r"(\w+) = empty_strided_cuda\(\(([\d, ]*)\), .*torch\.(\w+)\)", code)
    for name, shape, dtype in [*inputs, *made]:
        count = math.prod(int(n) for n in shape.split(",") if n.strip())
        if count >= least:
            sizes[name] = count * getattr(torch, dtype).itemsize
    for name, _, dtype in made:
        if name in sizes:
            buffers[dtype] = buffers.get(dtype, 0) + sizes[name]
    read = written = 0
    launches = re.findall(r"(triton_\w+)\.run\((.*), stream=", code)
    for kernel, given in launches:
        given = given.split(", ")
        if math.prod(int(n) for n in given if n.isdigit()) < least:
            continue  # it reads single numbers of large tensors
        for parameter, argument in zip(parameters[kernel], given, strict=False):
            size = sizes.get(argument, 0)
            read += size * len(re.findall(rf"tl\.load\({parameter} ", bodies[kernel]))
            written += size * len(re.findall(rf"tl\.store\({parameter} ", bodies[kernel]))
    return Traffic(len(launches), read, written, buffers)


def binaries_of(code: str, title: str, target: int) -> list[list[Binary]]:
    """Compiles the kernels of Inductor's code, each in the configurations among which it would choose."""
    from torch._inductor import config
    from torch._inductor.runtime import triton_helpers

    tried = []
    sources = re.findall(r"^(triton_\w+) = async_compile\.triton\('\w+', '''\n(.*?)^'''", code, re.M | re.S)
    with (
        tempfile.TemporaryDirectory() as folder,
        empty_cache(),
        absent_gpu(target),
        config.patch({"use_static_triton_launcher": False}),
        mock.patch.object(triton_helpers, "set_driver_to_gpu", lambda: None),
    ):
        for number, (name, source) in enumerate(sources):
            file = Path(folder) / f"kernel_{number}.py"  # Triton reads a kernel's source from its file
            file.write_text(source)
            spec = importlib.util.spec_from_file_location(f"kernel_{number}", file)
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            tuner = vars(module)[name]
            tried.append([])
            for options in tuner.configs:
                launch = Launch("", f"{title}, {number + 1}", target, str(options), "")
                compile_one = functools.partial(tuner._precompile_config, options)
                tried[-1].append(compile_logged(launch, lambda compile_one=compile_one: compile_one().kernel))
    return tried


if __name__ == "__main__":
    sys.exit(main())
