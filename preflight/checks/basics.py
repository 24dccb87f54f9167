"""The findings of doctor.py, how a check is run so that its error does not end the others, and the first checks: Python
and the packages. Standard library only, and in a syntax that old Pythons read: they have to report that they are too
old.
"""

from __future__ import annotations

import dataclasses
import importlib
import logging
import platform
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from packaging.requirements import Requirement

    from arguments import TrainArguments

    Check = Callable[["PlannedRun"], Iterator["Finding"]]

OK, WARNING, FAILURE = "ok", "warning", "failure"

REQUIREMENTS = Path(__file__).parents[2] / "requirements.txt"
OLDEST_PYTHON = (3, 10)
OLDEST = {"torch": "2.11", "transformers": "5.17"}  # the README promises that these work
# Packages of requirements.txt that most runs do not need.
NEEDED_FOR = {"wandb": "--wandb", "matplotlib": "eval_mmlu_hybrid.py and report.py"}
OPTIONAL = {
    "mamba-ssm": "fast scan on GPUs",
    "fla-core": "fast scan on GPUs, where there is no mamba-ssm",
    "causal-conv1d": "fast convolution on GPUs",
    "lm-eval": "--tasks of the evaluation",
    "tensorboard": "--tensorboard",
}


@dataclasses.dataclass(frozen=True)
class Finding:
    """Holds a line of the doctor's report. status: ok, warning or failure. name: what was checked. remedy: what to do;
    empty if all is well.
    """

    status: str
    name: str
    found: str
    remedy: str = ""

    @classmethod
    def of_error(cls, status: str, name: str, message: str) -> Finding:
        """Splits an error text of this project, "what is wrong; what to do". A name that it begins with is left out."""
        found, separator, remedy = " ".join(message.removeprefix(f"{name}: ").split()).rpartition("; ")
        return cls(status, name, found, remedy) if separator else cls(status, name, remedy)


@dataclasses.dataclass(frozen=True, eq=False)  # hashable, for functions that cache what they find out about a run
class PlannedRun:
    """Holds what is checked: a run with these options. nproc: its ranks on this machine (None: as many as there are
    GPUs for). collectives: whether to time what real processes send each other too.
    """

    args: TrainArguments
    nproc: int | None = None
    collectives: bool = False


def show(finding: Finding) -> None:
    """Prints a finding: what was found, and on the next line what to do."""
    print(f"{finding.status:<8} {finding.name}: {finding.found}", flush=True)
    if finding.remedy:
        print(f"{'':<8} -> {finding.remedy}", flush=True)


class CheckSkipped(Exception):
    """Raised by a check that needs something that another check has reported missing."""


def file_problem(file: Path) -> str | None:
    """Returns why a file cannot be written, or None. Makes the file if it is not there."""
    try:
        file.open("a").close()
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return None


def run_check(name: str, check: Check, run: PlannedRun) -> Iterator[Finding]:
    """Yields a check's findings as they come, and as findings also what it raised and what the project's loggers warned
    of.
    """
    warned = _Warnings()
    loggers = [logging.getLogger(name) for name in ("train", "llamba")]
    for logger in loggers:
        logger.addHandler(warned)
    try:
        yield from check(run)
    except CheckSkipped as error:
        yield Finding(WARNING, name, f"skipped: {error}, see above")
    except ValueError as error:
        yield Finding.of_error(FAILURE, name, str(error))
    except Exception as error:  # the other checks still run
        text = f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
        yield Finding(FAILURE, name, text, f"a run would fail with it too; raised in {_where(error)}")
    finally:
        for logger in loggers:
            logger.removeHandler(warned)
    yield from (Finding.of_error(WARNING, name, message) for message in dict.fromkeys(warned.messages))


class _Warnings(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def _where(error: Exception) -> str:
    """Returns file and line that raised an error."""
    traceback = error.__traceback__
    assert traceback is not None
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    return f"{traceback.tb_frame.f_code.co_filename}, line {traceback.tb_lineno}"


# --- Python and packages -------------------------------------------------------------------------------------


def check_python() -> Iterator[Finding]:
    version = platform.python_version()
    wanted = ".".join(map(str, OLDEST_PYTHON))
    if sys.version_info < OLDEST_PYTHON:
        remedy = f"make setup PYTHON=python3.11   (any Python from {wanted} on), then .venv/bin/python doctor.py"
        yield Finding(FAILURE, "Python", f"{version}, expected {wanted} or newer", remedy)
    else:
        yield Finding(OK, "Python", f"{version} in {sys.prefix}")


def check_packages(requirements: Path = REQUIREMENTS) -> Iterator[Finding]:
    """Compares what is installed with what requirements.txt pins for this Python."""
    try:
        from packaging.requirements import Requirement
    except ModuleNotFoundError:
        return  # the packages that need it are missing too, and `check_imports` reports them
    lines = [line.strip() for line in requirements.read_text(encoding="utf-8").splitlines()]
    for requirement in [Requirement(line) for line in lines if line and not line.startswith(("#", "-"))]:
        if requirement.marker is None or requirement.marker.evaluate():
            yield _compare(requirement)


def _compare(requirement: Requirement) -> Finding:
    from packaging.version import Version

    name, tested = requirement.name, str(requirement.specifier).lstrip("=")
    pip_line = f'python -m pip install "{name}{requirement.specifier}"'
    try:
        installed = Version(metadata.version(name))
    except metadata.PackageNotFoundError:
        if name in NEEDED_FOR:
            return Finding(WARNING, name, f"not installed; needed for {NEEDED_FOR[name]}", pip_line)
        return Finding(FAILURE, name, "not installed", pip_line)
    oldest = OLDEST.get(name)
    if oldest is not None and installed < Version(oldest):
        return Finding(FAILURE, name, f"{installed}, expected {oldest} or newer", pip_line)
    if not requirement.specifier.contains(installed, prereleases=True):
        return Finding(WARNING, name, f"{installed}; tested with {tested}", f"if it causes trouble: {pip_line}")
    return Finding(OK, name, str(installed))


def check_imports(
    names: tuple[str, ...] = ("torch", "transformers", "datasets", "accelerate"),
) -> Iterator[Finding]:
    """Yields a failure if a package cannot be imported; no other check can run then."""
    problems: dict[str, list[str]] = {}
    for name in names:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            problems.setdefault(f"no module {error.name}", []).append(name)
        except Exception as error:  # a library of another build raises nearly anything
            problems.setdefault(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}", []).append(name)
    if problems:
        text = "; ".join(f"{', '.join(names)} ({why})" for why, names in problems.items())
        yield Finding(FAILURE, "imports", f"cannot be imported: {text}", _how_to_install())


def _how_to_install() -> str:
    venv = REQUIREMENTS.with_name(".venv")
    if venv.is_dir() and Path(sys.prefix) != venv:
        return f"source {venv}/bin/activate, then run this again: the packages may be there"
    return "make setup   (or: python -m pip install -r requirements.txt)"


def installed_version(package: str) -> str | None:
    """Returns the version of a package, or None where it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def check_optional_packages(run: PlannedRun) -> Iterator[Finding]:
    for name, purpose in OPTIONAL.items():
        yield Finding(OK, name, f"{installed_version(name) or 'not installed, not needed'} ({purpose})")
    yield Finding(OK, "cartesia-pytorch", "not needed: llamba/ reads its published weights itself")
