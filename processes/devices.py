"""Chooses the devices of students and teacher, and checks what torch.compile needs there."""

import functools
import importlib.util
import os
import shutil

import torch

from processes.ranks import local_rank, local_world_size


def checked_device(flag: str, name: str | None) -> torch.device:
    """Returns the device called `name`, or the first GPU, or the CPU. Raises ValueError if it does not exist."""
    n_gpus = torch.cuda.device_count()
    if name is None:
        return torch.device("cuda:0" if n_gpus else "cpu")
    expected = "expected cpu" + (f" or cuda:0 to cuda:{n_gpus - 1}" if n_gpus else "; check CUDA_VISIBLE_DEVICES")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"{flag} {name}: {n_gpus} GPUs are visible here; {expected}") from error
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and (device.index or 0) >= n_gpus):
        raise ValueError(f"{flag} {name}: {n_gpus} GPUs are visible here; {expected}")
    # With its index, so that it equals the same device of a tensor or of a student.
    return torch.device("cuda:0") if device == torch.device("cuda") else device


@functools.cache
def can_compile(device_type: str) -> bool:
    """Returns whether torch.compile can work: "cpu" needs a C++ compiler, "cuda" needs Triton and a C compiler."""
    if device_type == "cuda" and importlib.util.find_spec("triton") is None:
        return False
    names = ("CXX", "c++", "g++", "clang++") if device_type == "cpu" else ("CC", "cc", "gcc", "clang")
    return any(shutil.which(name) for name in (os.environ.get(names[0], ""), *names[1:]))


def check_compiler(device_type: str) -> None:
    """Raises ValueError if --compile cannot work on this type of device."""
    if not can_compile(device_type):
        needed = "a C++ compiler" if device_type == "cpu" else "Triton and a C compiler"
        raise ValueError(f"--compile: torch.compile needs {needed}, not found here; install it or leave the option out")


def choose_devices(
    teacher_device: str | None, teacher_placement: str, runs_teacher: bool
) -> tuple[torch.device, torch.device]:
    """Returns the devices of this rank's student and of its teacher. Students take the first GPUs in order of local
    rank; a dedicated teacher takes the node's last visible GPU, a colocated one that of the rank's student. Without a
    GPU all are on the CPU. Raises ValueError if there are too few GPUs.
    """
    n_gpus, n_students = torch.cuda.device_count(), local_world_size()
    named = None if teacher_device is None else checked_device("--teacher_device", teacher_device)
    if n_gpus == 0:
        return torch.device("cpu"), named or torch.device("cpu")
    colocated = teacher_placement == "colocated"
    needed = n_students + (1 if runs_teacher and named is None and not colocated else 0)
    if n_gpus < needed:
        raise ValueError(
            f"--nproc_per_node {n_students}: needs {needed} visible GPUs ({n_students} for students"
            + (", the last for the teacher" if needed > n_students else "")
            + f"), and {n_gpus} are visible; start fewer processes, make more GPUs visible, "
            "or share students' GPUs with --teacher_device cuda:0 or --teacher_placement colocated"
        )
    student = torch.device("cuda", local_rank())
    return student, student if colocated else named or torch.device("cuda", n_gpus - 1)


def choose_device(named: str | None) -> torch.device:
    """Returns the device of a rank that needs no teacher: the one named, or a GPU of its own, or the CPU. Raises
    ValueError if it does not exist, or if there are too few GPUs.
    """
    n_gpus, n_ranks = torch.cuda.device_count(), local_world_size()
    if named is not None:
        device = checked_device("--device", named)
        if device.type == "cuda" and n_ranks > 1:
            raise ValueError(f"--device {named}: {n_ranks} ranks cannot share it; leave it out, each takes its own GPU")
        return device
    if n_gpus == 0:
        return torch.device("cpu")
    if n_gpus < n_ranks:
        raise ValueError(
            f"--nproc_per_node {n_ranks}: each rank takes a GPU, and {n_gpus} are visible; start fewer, or make more "
            "visible"
        )
    return torch.device("cuda", local_rank())


def default_prefetch(teacher_device: torch.device) -> int:
    """Returns how many batches the teacher works ahead: 1 on a device of its own, 0 on a student's, where there is
    nothing to gain, and on a CPU much to lose: both would compete for its cores.
    """
    students = [torch.device("cpu")]
    if torch.cuda.device_count() > 0:
        students = [torch.device("cuda", i) for i in range(local_world_size())]
    return 0 if teacher_device in students else 1
