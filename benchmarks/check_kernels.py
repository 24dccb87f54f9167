"""Compiles every Triton kernel that training launches, for GPUs that need not be here, and reports what they take.

    make check-kernels
    make check-kernels CHECK_KERNELS="--targets 90 --kernels chunk_scan --configs first"

A mixer of each student runs on PyTorch's device "meta" as training runs it. Triton compiles its launches ahead of time,
and the assembler says how many registers a kernel takes, how much it spills, and how much shared memory it wants. That
a kernel compiles does not mean that its results are right, nor how fast it is: `doctor.py` and `bench_gpu.py` try that
on a GPU. With MAMBA_DETERMINISTIC=1 in the environment it compiles the kernels of that mode.

A launch for which no configuration compiles and fits into the GPU's shared memory is an error: the exit code is 1.
"""

import argparse
import importlib.util
import sys
import time
from importlib.metadata import version
from pathlib import Path

from harness import write_json
from kernel_binaries import Binary, compile_all
from kernel_launches import CASES, CHIPS, SCANS, STUDENTS, Choice, launches, short_name
from kernel_report import details_of, problems_of, remarks_of, table_of


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    chips = ", ".join(f"{target} ({chip.name})" for target, chip in CHIPS.items())
    configs = (
        "how many of the configurations among which Triton's autotuner chooses: `all`; all in the case 'training', and "
        "in others those up to the first that fits and spills nothing (`training`, the default); or only those "
        "everywhere (`first`)"
    )
    parser.add_argument("--targets", nargs="+", type=int, choices=CHIPS, metavar="N", default=[80, 90, 100], help=chips)
    parser.add_argument("--kernels", nargs="+", metavar="NAME", help="only kernels whose names contain one of these")
    students = {"choices": STUDENTS, "metavar": "PRESET", "default": ["llamba-8b", "llama-8b"]}
    parser.add_argument("--students", nargs="+", help=f"of {', '.join(STUDENTS)}", **students)
    cases = {"choices": CASES, "metavar": "CASE", "default": list(CASES)}
    parser.add_argument("--cases", nargs="+", help=f"of {', '.join(map(repr, CASES))}", **cases)
    scan = "mamba-ssm (default), or fla-core, which looks at the GPU when it is imported: give one target"
    parser.add_argument("--scan", choices=SCANS, default="mamba-ssm", help=scan)
    parser.add_argument("--configs", choices=("all", "training", "first"), default="training", help=configs)
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="that compile at a time (default: 2)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write a row for each configuration to this file")
    options = parser.parse_args()
    if options.scan == "fla-core" and len(options.targets) > 1:
        parser.error("--scan fla-core takes one of --targets at a time")
    return options


def main() -> int:
    options = parse_options()
    if importlib.util.find_spec("triton") is None:
        sys.exit("Triton is not installed here; `make check-kernels` installs one for this script alone")
    jobs = [job for target in options.targets for job in jobs_for(target, options)]
    if not jobs:
        sys.exit(f"--kernels {' '.join(options.kernels)}: no kernel has such a name")
    start = time.monotonic()
    tried = compile_all(jobs, options.processes, show)
    seconds = time.monotonic() - start
    versions = ", ".join(f"{package} {version(package)}" for package in ("triton", options.scan, "torch"))
    print(f"\n{versions}, {time.strftime('%Y-%m-%d')}, {seconds:.0f} s")
    print("", *table_of(tried), sep="\n")
    if options.json is not None:
        write_json([details_of(binary) for binaries in tried for binary in binaries], options.json)
    problems = list(problems_of(tried))
    print("", *remarks_of(tried), *problems, sep="\n")
    return 1 if problems else 0


def jobs_for(target: int, options: argparse.Namespace) -> list[tuple[Choice, bool]]:
    """Returns the launches on a GPU, and for each whether every configuration is to be compiled."""
    found = launches(target, options.scan, options.students, options.cases)
    jobs = []
    for choice, needs in found.items():
        if options.kernels and not any(name in choice[0].kernel for name in options.kernels):
            continue
        in_training = any(need.startswith("training") for need in needs)
        jobs.append((choice, options.configs == "all" or (options.configs == "training" and in_training)))
    kernels = {choice[0].kernel for choice, _ in jobs}
    print(f"sm_{target}: {len(kernels)} kernels, {len(jobs)} launches that differ", flush=True)
    return jobs


def show(tried: list[Binary]) -> None:
    """Prints a line on one launch, so that a run of many minutes is seen to do something."""
    launch, n_fit = tried[0].launch, sum(binary.fits for binary in tried)
    seconds = sum(binary.seconds for binary in tried)
    print(f"sm_{launch.target} {short_name(launch)}: {n_fit} of {len(tried)} fit, {seconds:.1f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main())
