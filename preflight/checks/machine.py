"""The checks of doctor.py for the machine: environment variables and GPUs. The other checks learn here how many ranks a
run has on this machine, and on which devices.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from preflight.checks.basics import FAILURE, OK, WARNING, Finding, PlannedRun
from processes.devices import check_compiler, choose_devices
from processes.ranks import check_launch

GB = 1e9

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
