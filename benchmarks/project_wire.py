"""Prints the table of docs/scaling.md that projects the exchange of an optimizer step to links and GPUs that are not
here, by the plan's own functions: estimates of the default 8B models, with a teacher beside each student and one micro
step to a step. Nodes have 8 GPUs each.

    PYTHONPATH=. python benchmarks/project_wire.py
"""

import dataclasses

from harness import ROOT

from arguments import parse_train_args
from preflight.footprint import measure_footprint
from preflight.machine import Machine
from preflight.plan import make_plan
from preflight.transport import GB, PCIE, RATES, Link

LINKS, GPUS, OF_A_NODE = (1, 5, 50), (8, 64, 1024), 8
PEAK = 650e12  # operations per second that an H100 reaches
ENGINES = {
    "allreduce": {},
    "owners": {"gradient_exchange": "owners"},
    "owners, 8 bits": {"gradient_exchange": "owners", "gradient_bits": 8},
}


def main() -> None:
    print("\n".join(table()))


def table() -> list[str]:
    """Returns the lines: for each link and number of GPUs, and each exchange, the seconds of a step, those of the wire
    that no work hides, and what bounds the step.
    """
    given = ["--config", str(ROOT / "configs" / "production.yaml"), "--output_dir", "unused"]
    args = parse_train_args([*given, "--teacher_placement", "colocated"])
    footprint = measure_footprint(args)
    lines = [f"| link, GB/s | GPUs | {' | '.join(ENGINES)} |", "| --- " * (2 + len(ENGINES)) + "|"]
    for rate in LINKS:
        for n in GPUS:
            machine = machine_of(rate, n)
            steps = [
                make_plan(dataclasses.replace(args, **changes), footprint, machine, "colocated").step
                for changes in ENGINES.values()
            ]
            cells = [f"{step.seconds:.2f} s, wire {step.wire:.2f}: {step.bound_by}" for step in steps]
            lines.append(f"| {rate} | {n} | {' | '.join(cells)} |")
    return lines


def machine_of(rate: float, n_gpus: int) -> Machine:
    """Returns nodes whose link carries so many GB/s; inside, GPUs reach each other by PCIe, or as fast as that."""
    inside = max(RATES[PCIE], rate * GB)
    n_nodes = n_gpus // OF_A_NODE
    return Machine(OF_A_NODE, 80 * GB, PEAK, n_nodes, link=Link(rate * GB, "given"), inside_rate=inside)


if __name__ == "__main__":
    main()
