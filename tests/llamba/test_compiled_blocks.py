"""`--compile` makes one graph of each kind of block, however many blocks there are, and no graph breaks: with the scan
as one operator, norms, SwiGLU and gate fused, gradient checkpointing on and off, under DDP as in a run.
"""

import dataclasses
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.distributed as dist
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters

from arguments import parse_train_args
from distillation.objective import Distillation, DistillationModel
from distillation.teacher import NoTeacher
from llamba import kernels
from llamba.elementwise import FUSED_ELEMENTWISE, Region
from llamba.kernels import Kernels, causal_conv, kernels_for, plain_kernels
from llamba.mamba_scan import mamba_scan
from model_utils import apply_replacements, prepare_student
from monitoring.undisturbed import undisturbed
from tests.llamba import mamba_kernels
from tests.tiny import tiny_student, tiny_teacher, tokens
from text.batch import Batch

CPU = torch.device("cpu")
LENGTH = 16


@pytest.fixture
def one_rank():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture
def graphs(monkeypatch):
    """Returns the graphs that reach torch.compile's default backend, whose code generator is left out."""
    found = []

    def compile_fx(graph, inputs, **_):
        found.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", compile_fx)
    torch._dynamo.reset()
    counters.clear()
    yield found
    torch._dynamo.reset()


def make_run(checkpointing, freezing, compiles=True, heads=None):
    """Returns a student of 6 layers under DDP, as train_gpus.py has it, and what descends its loss. heads: of layers,
    that it keeps of the teacher.
    """
    options = ["--layers", "1", "4", "--kl_weight", "0", "--save_interval", "0"]
    options += ["--compile"] * compiles + ["--gradient_checkpointing"] * checkpointing
    options += ["--freeze_mlp" if freezing else "--no_freeze_mlp"]
    options += ["--freeze_replaced_layers" if freezing else "--no_freeze_replaced_layers"]
    args = parse_train_args(options)
    student = tiny_student(n_layer=6).train()
    apply_replacements(student, tiny_teacher(num_hidden_layers=6, intermediate_size=48), args.layers, heads)
    prepare_student(student, args)
    model = DistillationModel(student, None, 50, dataclasses.replace(args, compile=False))  # the loss is not a block
    return student, Distillation(model, CPU)


def step(run):
    windows = tokens(2, LENGTH + 1)
    return run.backward(Batch.from_windows(windows), NoTeacher(CPU).submit(windows), 1.0, is_last=True)


@pytest.mark.parametrize("checkpointing,freezing", [(False, True), (True, False)])
def test_a_kind_of_block_is_one_graph(one_rank, graphs, monkeypatch, checkpointing, freezing):
    scan = mamba_scan(mamba_kernels)
    chosen = Kernels("mamba-ssm", scan, "plain", causal_conv, FUSED_ELEMENTWISE)
    monkeypatch.setitem(kernels._chosen, ("cpu", torch.float32), chosen)
    monkeypatch.setattr(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 1)  # a block of 8B has more weights than a bucket of DDP
    student, run = make_run(checkpointing, freezing)
    run.begin((2, LENGTH))
    first = step(run)
    assert len(graphs) == 2 and not counters["graph_break"]

    # What happens in the course of a run compiles nothing anew.
    kernels_for("cpu", torch.bfloat16)  # another model's kernels are chosen
    with undisturbed(student, compiled=True):
        student(tokens(1, 9), use_cache=False)
    step(run)
    assert len(graphs) == 2 and not counters["graph_break"]

    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(step(run), first)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_blocks_with_kept_heads_are_a_graph_for_each_way_of_sharing(one_rank, graphs, checkpointing):
    _, run = make_run(checkpointing, freezing=True, heads={2: [0, 1], 3: [2, 3], 5: [0, 2, 3]})
    run.begin((2, LENGTH))
    first = step(run)
    assert len(graphs) == 4 and not counters["graph_break"]  # of mixers alone, whole layers, and two ways of sharing
    assert torch.equal(step(run), first) and len(graphs) == 4
    with torch.compiler.set_stance("force_eager"):
        torch.testing.assert_close(step(run), first)


@torch._dynamo.config.patch(recompile_limit=2)
def test_every_kind_of_block_is_compiled_however_many_there_are(graphs):
    """torch gives a function up after so many graphs, else eight, and would run the other blocks as they are."""
    student = tiny_student(n_layer=3)
    apply_replacements(student, tiny_teacher(num_hidden_layers=3), [], {1: [0], 2: [0, 1]})
    prepare_student(student, parse_train_args(["--compile"]))
    student(tokens(2, LENGTH), use_cache=False)
    assert len(graphs) == 3


def test_without_compile_only_the_regions_are_compiled_and_once(one_rank, graphs, monkeypatch):
    """SwiGLU, the gate and their gradients, for all blocks, and whichever thread runs backward: on a GPU it is not the
    main one.
    """
    fused = FUSED_ELEMENTWISE._replace(swiglu=fresh(FUSED_ELEMENTWISE.swiglu), gate=fresh(FUSED_ELEMENTWISE.gate))
    monkeypatch.setitem(kernels._chosen, ("cpu", torch.float32), plain_kernels()._replace(elementwise=fused))
    _, run = make_run(checkpointing=True, freezing=True, compiles=False)
    run.begin((2, LENGTH))
    for _ in range(2):
        with ThreadPoolExecutor(1) as thread:
            thread.submit(step, run).result()
    assert len(graphs) == 4 and not counters["graph_break"]


def fresh(region):
    return Region(region.title, region.plain, region.forward, region.backward)
