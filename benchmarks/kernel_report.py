"""What check_kernels.py says about kernels that it has compiled: a table for RESULTS.md, remarks, and errors."""

from collections.abc import Iterable, Iterator
from typing import Any

from kernel_binaries import Binary
from kernel_launches import CHIPS, short_name

# By the package of the kernel, none for torch.compile's.
END = "On such a GPU training would end at its first step: try another Triton, or train without"
REMEDIES = {
    "mamba_ssm": f"{END} mamba-ssm (pip uninstall mamba-ssm)",
    "fla": f"{END} fla-core (pip uninstall fla-core)",
    "": "On such a GPU it would run in plain PyTorch, slower: try another Triton",
}

Tried = list[Binary]  # the configurations that were compiled for one launch

HEAVY = 256  # bytes that each thread spills in the configuration that spills least, from which on a remark says so
HEADER = (
    *("kernel", "GPU", "launches", "compiled", "fit", "registers"),
    *("spilled, best", "spilled, worst", "shared, KB", "products", "s"),
)


def table_of(tried: list[Tried]) -> list[str]:
    """Returns the lines of a Markdown table with a row for each kernel and GPU. Launches of one kernel differ in types,
    sizes and divisibility. `spilled, best`: bytes of a thread in the configuration that spills least, of the launch
    for which that is most.
    """
    lines = [HEADER, ("---",) * len(HEADER), *map(row_of, by_kernel(tried))]
    return [f"| {' | '.join(line)} |" for line in lines]


def by_kernel(tried: list[Tried]) -> list[list[Tried]]:
    """Returns the launches grouped by kernel and GPU, kernels in the order of their first launch."""
    groups: dict[tuple[str, int], list[Tried]] = {}
    for launch in tried:
        groups.setdefault((launch[0].launch.kernel, launch[0].launch.target), []).append(launch)
    kernels = list(dict.fromkeys(kernel for kernel, _ in groups))
    return [groups[key] for key in sorted(groups, key=lambda key: (kernels.index(key[0]), key[1]))]


def row_of(group: list[Tried]) -> tuple[str, ...]:
    binaries = [binary for tried in group for binary in tried]
    compiled = [binary for binary in binaries if not binary.error]
    first = binaries[0].launch
    best = [min(binary.spilled for binary in tried if binary.fits) for tried in group if any(b.fits for b in tried)]
    return (
        short_name(first),
        CHIPS[first.target].name,
        str(len(group)),
        f"{len(compiled)} of {len(binaries)}",
        str(sum(binary.fits for binary in binaries)),
        span(binary.registers for binary in compiled),
        str(max(best)) if best else "-",
        str(max(binary.spilled for binary in compiled)) if compiled else "-",
        span(round(binary.shared / 1024) for binary in compiled),
        ", ".join(sorted({products_of(binary) for binary in compiled} - {""})) or "-",
        f"{sum(binary.seconds for binary in binaries):.0f}",
    )


def products_of(binary: Binary) -> str:
    return f"{binary.products} (serialized)" if binary.serialized else binary.products


def span(values: Iterable[int]) -> str:
    values = set(values)
    return "-" if not values else " to ".join(str(n) for n in sorted({min(values), max(values)}))


def details_of(binary: Binary) -> dict[str, Any]:
    """Returns the fields of one configuration, for a JSON file."""
    launch = {"kernel": short_name(binary.launch), "target": binary.launch.target, "config": binary.launch.config}
    return {**launch, **{name: value for name, value in vars(binary).items() if name != "launch"}, "fits": binary.fits}


def problems_of(tried: list[Tried]) -> Iterator[str]:
    """Yields an error, with what to do, for each launch for which no configuration compiles and fits."""
    for binaries in tried:
        if any(binary.fits for binary in binaries):
            continue
        launch = binaries[0].launch
        chip = CHIPS[launch.target]
        reasons = list(dict.fromkeys(binary.error or too_large(binary) for binary in binaries))
        yield (
            f"error: {short_name(launch)} on {chip.name} (sm_{launch.target}): none of {len(binaries)} configurations "
            f"compiles and fits: {'; '.join(reasons)}. {REMEDIES[launch.module.split('.')[0]]}"
        )


def too_large(binary: Binary) -> str:
    return f"{binary.shared} bytes of shared memory, {CHIPS[binary.launch.target].shared} are there"


def remarks_of(tried: list[Tried]) -> Iterator[str]:
    """Yields a line for each kernel and GPU that will be slow, because all its configurations spill much."""
    for group in by_kernel(tried):
        launches = [[binary for binary in binaries if binary.fits] for binaries in group]
        spilled = max((min(binary.spilled for binary in fits) for fits in launches if fits), default=0)
        if spilled >= HEAVY:
            launch = group[0][0].launch
            yield (
                f"warning: {short_name(launch)} on {CHIPS[launch.target].name} (sm_{launch.target}) spills {spilled} "
                "bytes a thread in its best configuration, which makes it slow"
            )
