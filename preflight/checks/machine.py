"""The checks of doctor.py for the machine: environment variables, GPUs and the kernels for them. The other checks learn
here how many ranks a run has on this machine, and on which devices.
"""

import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from llamba import LlambaConfig
from llamba.kernels import Kernels, causal_conv, kernels_for
from llamba.ssd import ssd_chunked
from model_utils import DTYPES
from preflight.checks.basics import FAILURE, OK, WARNING, Finding, PlannedRun
from processes.devices import check_compiler, choose_devices
from processes.ranks import check_launch

GB = 1e9
PLAIN = "plain PyTorch"  # as llamba.kernels names it

# Environment variables, the values that cost speed, and what happens.
COSTLY = (
    (
        "NCCL_P2P_DISABLE",
        "1",
        "GPUs copy to each other through the host; an all-reduce takes several times as long",
    ),
    ("NCCL_SHM_DISABLE", "1", "ranks of one machine talk through sockets; an all-reduce takes several times as long"),
    ("NCCL_IB_DISABLE", "1", "nodes talk by TCP and not by InfiniBand; on a single machine it costs nothing"),
    ("NCCL_DEBUG", "INFO TRACE", "NCCL fills the log; TRACE also slows every call"),
    ("NCCL_LAUNCH_BLOCKING", "1", "ranks wait for every collective; nothing overlaps with it"),
    ("TORCH_NCCL_BLOCKING_WAIT", "1", "ranks wait for every collective; nothing overlaps with it"),
    ("CUDA_LAUNCH_BLOCKING", "1", "ranks wait for every kernel: a step takes up to several times as long"),
    (
        "TORCH_DISTRIBUTED_DEBUG",
        "DETAIL",
        "taken as INFO; with KEEP_DISTRIBUTED_DEBUG=1 ranks check each other's arguments before every collective",
    ),
    ("PYTORCH_NO_CUDA_MEMORY_CACHING", "1", "every tensor waits for the driver; a step takes many times as long"),
    ("TOKENIZERS_PARALLELISM", "0 false no off", "the tokenizer uses one core only"),
)
ALLOCATOR = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def default_nproc(run: PlannedRun) -> int:
    """Returns the ranks of the run on this machine: --nproc_per_node, or as many as there are GPUs for."""
    n_gpus = torch.cuda.device_count()
    has_its_own = run.args.has_teacher and run.args.placement == "dedicated"
    return run.nproc or max(1, n_gpus - (has_its_own and run.args.teacher_device is None))


@contextmanager
def launched_as(n_ranks: int) -> Iterator[None]:
    """Sets the environment in which torchrun would start rank 0 of `n_ranks`, as far as `choose_devices` reads it."""
    before = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ["LOCAL_WORLD_SIZE"] = str(n_ranks)
    try:
        yield
    finally:
        os.environ.pop("LOCAL_WORLD_SIZE")
        if before is not None:
            os.environ["LOCAL_WORLD_SIZE"] = before


def devices(run: PlannedRun) -> tuple[torch.device, torch.device]:
    """Returns the devices of rank 0's student and teacher. Raises ValueError, as a run does, if GPUs are too few."""
    args = run.args
    with launched_as(default_nproc(run)):
        return choose_devices(args.teacher_device, args.placement, runs_teacher=args.has_teacher)


def run_device() -> torch.device:
    """Returns the device of rank 0's student."""
    return torch.device("cuda:0" if torch.cuda.device_count() else "cpu")


# --- settings ------------------------------------------------------------------------------------------------


def check_environment(run: PlannedRun) -> Iterator[Finding]:
    found = False
    try:
        check_launch()
    except ValueError as error:
        found = True
        yield Finding.of_error(FAILURE, "ranks", str(error))
    for name, costly, cost in COSTLY:
        value = os.environ.get(name, "")
        if value and value.lower() in costly.lower().split():
            found = True
            yield Finding(WARNING, f"{name}={value}", cost, f"unset {name}   (unless this machine needs it)")
    for name in ALLOCATOR:
        if "cudaMallocAsync" in os.environ.get(name, "") or "max_split_size_mb" in os.environ.get(name, ""):
            found = True
            cost = "memory is allocated in another way than the plan and --loss_chunk_tokens expect"
            yield Finding(WARNING, f"{name}={os.environ[name]}", cost, f"export {name}=expandable_segments:True")
    n_cores, n_ranks = len(os.sched_getaffinity(0)), default_nproc(run)
    threads = os.environ.get("OMP_NUM_THREADS", "")
    if torch.cuda.device_count() == 0:
        share = max(1, n_cores // n_ranks)
        if threads.isdecimal() and int(threads) * n_ranks > n_cores:
            found = True
            cost = f"{n_ranks} rank(s) on {n_cores} core(s) get in each other's way"
            yield Finding(WARNING, f"OMP_NUM_THREADS={threads}", cost, f"export OMP_NUM_THREADS={share}")
        elif not threads and 1 < n_ranks < n_cores:
            found = True
            cost = f"torchrun gives each rank one thread, of {n_cores} cores"
            yield Finding(WARNING, "OMP_NUM_THREADS", f"not set: {cost}", f"export OMP_NUM_THREADS={share}")
    if not found:
        yield Finding(OK, "environment", "nothing in it costs speed")


def check_shared_memory(run: PlannedRun, place: str = "/dev/shm") -> Iterator[Finding]:
    """Checks shared memory, which NCCL uses between GPUs without a direct link, and which loader workers use."""
    size = shutil.disk_usage(place).total
    needed = torch.cuda.device_count() > 1 or run.args.dataset_workers > 0
    if needed and size < 1e9:
        remedy = "start the container with --ipc=host, or --shm-size=8g"
        yield Finding(WARNING, place, f"{size / 1e6:.0f} MB; NCCL and --dataset_workers may need more", remedy)
    else:
        yield Finding(OK, place, f"{size / GB:.1f} GB" + ("" if needed else ", not needed here"))


# --- GPUs ----------------------------------------------------------------------------------------------------


def has_driver() -> bool:
    return Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None


def check_gpus(run: PlannedRun) -> Iterator[Finding]:
    n_gpus, cuda = torch.cuda.device_count(), torch.version.cuda
    if n_gpus == 0 and not has_driver():
        yield Finding(OK, "GPUs", f"none, and no NVIDIA driver (torch {torch.__version__}): the run is on the CPU")
    elif n_gpus == 0 and cuda is None:
        remedy = (
            "python -m pip install --force-reinstall torch --index-url https://download.pytorch.org/whl/CUDA_BUILD   "
            "(see pytorch.org for CUDA_BUILD)"
        )
        found = f"there is an NVIDIA driver, but torch {torch.__version__} is a CPU build"
        yield Finding(WARNING, "GPUs", found, remedy)
    elif n_gpus == 0:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        found = f"there is an NVIDIA driver, but torch (for CUDA {cuda}) sees no GPU"
        hidden = "unset CUDA_VISIBLE_DEVICES" if visible is not None else f"nvidia-smi: is its CUDA {cuda} or newer?"
        yield Finding(WARNING, "GPUs", found, f"{hidden}; in a container: docker run --gpus all")
    for index in range(n_gpus):
        yield from _check_gpu(index, run)


def _check_gpu(index: int, run: PlannedRun) -> Iterator[Finding]:
    device, name = torch.device("cuda", index), f"cuda:{index}"
    major, minor = torch.cuda.get_device_capability(device)
    free, total = torch.cuda.mem_get_info(device)
    facts = f"{torch.cuda.get_device_name(device)}, {free / GB:.1f} of {total / GB:.1f} GB free"
    if problem := kernel_problem(device):
        remedy = f"install a torch that is built for compute capability {major}.{minor}: see pytorch.org"
        yield Finding(FAILURE, name, f"{facts}; no kernel runs on it: {problem}", remedy)
        return
    if free < 0.9 * total:
        remedy = f"nvidia-smi -i {index}   names the processes; end them, or leave this GPU out of CUDA_VISIBLE_DEVICES"
        yield Finding(WARNING, name, f"{facts}: other processes hold the rest", remedy)
    elif run.args.dtype == "bfloat16" and major < 8:
        remedy = "--dtype float16, or GPUs of compute capability 8.0 and newer"
        yield Finding(WARNING, name, f"{facts}; capability {major}.{minor} has no bfloat16 and emulates it", remedy)
    else:
        yield Finding(OK, name, f"{facts}, capability {major}.{minor}, torch for CUDA {torch.version.cuda}")


def kernel_problem(device: torch.device) -> str | None:
    """Returns why no kernel runs on a GPU, or None: it may be broken, or this torch was not built for it."""
    try:
        torch.ones(8, device=device).sum().item()
        return None
    except RuntimeError as error:
        return " ".join(str(error).split())[:200]


def check_ranks(run: PlannedRun) -> Iterator[Finding]:
    n_ranks = default_nproc(run)
    args = run.args
    student, teacher = devices(run)
    where = "students on the CPU" if student.type == "cpu" else f"students on cuda:0 to cuda:{n_ranks - 1}"
    if args.has_teacher:
        where += f", teacher {'beside each' if args.placement == 'colocated' else f'on {teacher}'}"
    yield Finding(OK, f"--nproc_per_node {n_ranks}", where)


def check_compile(run: PlannedRun) -> Iterator[Finding]:
    if run.args.compile:
        check_compiler(run_device().type)
        yield Finding(OK, "--compile", "its compiler is installed")


# --- kernels -------------------------------------------------------------------------------------------------

# How far a kernel may be from the plain form in float32, ||out - truth|| / ||truth||. Rounding to bfloat16 changes a
# number by up to 0.4%; a scan rounds inputs, scores, states and results, and the gradient of a decay sums differences
# of such numbers: 1% is usual. In float32 Triton multiplies in TF32, which rounds by up to 0.05%. A kernel that mixes
# up heads, chunks or tokens is off by about 100%.
TOLERANCE = {torch.bfloat16: 0.05, torch.float16: 0.02, torch.float32: 0.01}


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
    kernels: Kernels, device: torch.device, dtype: torch.dtype, config: LlambaConfig
) -> Iterator[Finding]:
    """Compares the chosen kernels with the plain forms, on random inputs of one mixer of such a model."""
    scan, chunk_size = draw_scan(config, device, dtype), config.ssm_cfg["chunk_size"]
    conv, activation = draw_conv(config, device, dtype), config.ssm_cfg["activation"]
    trials: tuple[tuple[str, str, str, list[Tensor], Callable[..., Tensor], Callable[..., Tensor]], ...] = (
        (
            "scan",
            kernels.scan_name,
            "mamba-ssm",
            scan,
            lambda x, decay, B_, C: kernels.scan(x, decay, B_, C, chunk_size)[0],
            lambda x, decay, B_, C: ssd_chunked(x, decay, B_, C, chunk_size)[0],
        ),
        (
            "convolution",
            kernels.conv_name,
            "causal-conv1d",
            conv,
            lambda x, weight, bias: kernels.conv(x, weight, bias, activation, None),
            lambda x, weight, bias: causal_conv(x, weight, bias, activation, None),
        ),
    )
    for name, chosen, package, inputs, fast, plain in trials:
        title = f"{name}, {str(dtype).removeprefix('torch.')}"
        if chosen == PLAIN:
            remedy = f"make setup-cuda   (installs {package}; requirements-cuda.txt lists what it needs)"
            yield Finding(WARNING, title, "plain PyTorch: correct, but slower than a kernel", remedy)
            continue
        error = largest_error(fast, plain, inputs)
        found = f"{chosen} differs by {error:.2g} from the plain form in float32, {TOLERANCE[dtype]:g} is allowed"
        if error <= TOLERANCE[dtype]:
            yield Finding(OK, title, found)
        else:
            remedy = f"python -m pip uninstall {chosen}   (the plain form replaces it), or install another version"
            yield Finding(FAILURE, title, found, remedy)


def largest_error(fast: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor]) -> float:
    """Returns the largest relative error of the result and of the gradients of all inputs; infinity if one is not
    finite.
    """
    exact = [m.detach().float().requires_grad_() for m in inputs]
    truth = plain(*exact)
    d_y = torch.randn_like(truth)
    truths = [truth, *torch.autograd.grad(truth, exact, d_y)]
    result = fast(*inputs)
    results = [result, *torch.autograd.grad(result, inputs, d_y.to(result.dtype))]
    errors = [(one.float() - other).norm() / other.norm() for one, other in zip(results, truths, strict=True)]
    worst = torch.stack(errors).max().item()  # NaN if one of them is
    return worst if math.isfinite(worst) else math.inf


def draw_scan(config: LlambaConfig, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Draws x (B, L, H, P), log_decay (B, L, H) in float32, B_ and C (B, L, G, N). The last chunk is not full."""
    ssm, length = config.ssm_cfg, 2 * config.ssm_cfg["chunk_size"] + 44

    def normal(*shape: int) -> Tensor:
        return torch.randn(2, length, *shape, device=device)

    x, log_decay = normal(ssm["n_v_heads"], config.headdim).to(dtype), -F.softplus(normal(ssm["n_v_heads"]))
    B_, C = (normal(ssm["n_qk_heads"], ssm["d_state"]).to(dtype) for _ in range(2))
    return [m.requires_grad_() for m in (x, log_decay, B_, C)]


def draw_conv(config: LlambaConfig, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Draws x (B, channels, L), laid out as the mixer has it, weight (channels, width) and bias (channels,)."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device, dtype=dtype)

    x = normal(2, 300, config.d_xBC).transpose(1, 2)
    return [m.requires_grad_() for m in (x, normal(config.d_xBC, config.ssm_cfg["d_conv"]), normal(config.d_xBC))]
