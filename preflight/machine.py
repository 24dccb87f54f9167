"""The machine that a plan is for: its GPUs, how fast they are, and the link between ranks."""

from dataclasses import dataclass

import torch

from arguments import TrainArguments
from model_utils import DTYPES
from monitoring.speed import memory_rate, peak_operations
from preflight.transport import GB, RATES, Link, find_link, way_inside
from preflight.wire import Seats
from processes.ranks import launched_world_size, local_world_size, was_launched

# Without visible GPUs: the machine of the README's long run, five H100.
N_GPUS, GPU_BYTES, PEAK, MEMORY_PEAK = 5, 80 * GB, 989e12, 3.35e12
# What such models reach of a data sheet's figures: an H100's products 650 TFLOP/s at 2048 tokens, since a GPU under
# full load lowers its clock, and passes over its memory 3 TB/s.
REACHED_OF_PRODUCTS, REACHED_OF_MEMORY = 0.66, 0.9


@dataclass(frozen=True)
class Machine:
    """Holds one node, and how many such nodes there are."""

    n_gpus: int
    gpu_bytes: float  # of each GPU
    speed: float  # operations per second that matrix products reach on a GPU
    n_nodes: int = 1
    n_students: int | None = None  # that torchrun has started on each node, if it has
    memory_rate: float = REACHED_OF_MEMORY * MEMORY_PEAK  # bytes per second that passes over a GPU's memory reach
    link: Link = Link(5 * GB, "assumed")  # of a rank to the others; of a node, where there are several
    inside_rate: float | None = None  # of a rank to others of its node, where there are several; None: as the link's

    def seconds(self, operations: float, moved: float) -> float:
        """Returns how long a GPU takes for so many operations of products and, beside them, so many bytes."""
        return operations / self.speed + moved / self.memory_rate

    def seats(self, n_students: int) -> Seats:
        """Returns the ranks, with so many students on each node, and their links."""
        return Seats(n_students * self.n_nodes, self.link.rate, self.n_nodes, self.inside_rate)


def find_machine(args: TrainArguments) -> Machine:
    """Returns the machine that the options describe; what they leave out, torchrun and the visible GPUs say, or else it
    is a machine with five H100. Raises ValueError if it has too few GPUs.
    """
    visible = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    gpu_bytes, peak, memory = GPU_BYTES, PEAK, None
    if visible:
        gpu_bytes = min(gpu.total_memory for gpu in visible)
        peak = peak_operations(visible[0].name, DTYPES[args.dtype]) or PEAK
        memory = memory_rate(visible[0].name)
    peak = peak if args.tflops is None else args.tflops * 1e12
    n_nodes = args.nodes or launched_world_size() // local_world_size()
    n_students = local_world_size() if was_launched() else None
    needed = gpus_needed(args, n_students or 1)
    n_gpus = args.gpus or len(visible) or (needed if n_students else max(needed, N_GPUS))
    if n_gpus < needed:
        raise ValueError(
            f"--gpus {n_gpus}: too few, this run takes {needed}; one GPU holds both models with "
            "--teacher_placement colocated"
        )
    link = find_link(args.link_gb_per_s, n_nodes)
    return Machine(
        n_gpus,
        gpu_bytes if args.gpu_gb is None else args.gpu_gb * GB,
        REACHED_OF_PRODUCTS * peak,
        n_nodes,
        n_students,
        # Of a GPU that is not known, in an H100's proportion.
        REACHED_OF_MEMORY * (memory or MEMORY_PEAK * peak / PEAK),
        link,
        max(RATES[way_inside()], link.rate) if n_nodes > 1 else None,
    )


def gpus_needed(args: TrainArguments, n_students: int) -> int:
    """Returns the GPUs that a node needs for its students and their teacher."""
    if not args.has_teacher or args.placement == "colocated" or args.teacher_device == "cpu":
        return n_students
    if args.teacher_device is None:
        return n_students + 1
    index = args.teacher_device.removeprefix("cuda:")
    if not index.isdecimal():
        raise ValueError(f"--teacher_device {args.teacher_device}: expected cpu, or cuda:N")
    return max(n_students, int(index) + 1)
