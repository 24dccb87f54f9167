"""The checks of doctor.py that read weights: whether they and the teacher's logits are finite. Files are read tensor by
tensor; only a small teacher is loaded.
"""

import functools
import math
import zipfile
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import PreTrainedModel

from distillation.first_answer import count_not_finite
from distillation.pairing import PROBE
from inputs.loaded_models import not_finite
from inputs.model_files import parameter_sizes, stored_dtypes, weight_files
from llamba.quantised import is_parameter
from model_utils import DTYPES, get_teacher_model, locate_model
from preflight.checks.basics import FAILURE, OK, Finding, PlannedRun
from preflight.checks.machine import GB, run_device
from preflight.checks.models import model_files, separator_of, skeletons, teacher_place, teacher_tokenizer
from text.encoding import Encoder

SMALL_MODEL = 200_000_000  # parameters; they take seconds to read
MOST_READ = 40 * GB  # of both models; what takes more minutes to read is left to the run
MOST_IN_MEMORY = 4 * GB  # of an old .bin file, which is held whole
LONG_READ = 1 * GB  # what is larger takes more than seconds, so a line says first what is read


def check_finite(run: PlannedRun) -> Iterator[Finding]:
    """Looks for values among the weights that are not finite in the run's dtype, as the run does when it has loaded
    them.
    """
    left = MOST_READ
    for files in model_files(run):
        if not files.needs_weights:
            continue
        try:
            place = Path(locate_model(files.flag, files.name, True))
            config = files.read(files.flag, files.name, str(place))
        except ValueError:
            continue  # reported by `check_model_files`
        stored = weight_files(files.flag, files.name, place)
        title, size = f"weights of {files.flag} {files.name}", sum(file.stat().st_size for file in stored)
        if reason := _why_not_read(stored, size, left):
            yield Finding(OK, title, f"{size / GB:.3g} GB, not read: {reason}; a run checks what it has loaded")
            continue
        left -= size
        if size > LONG_READ:
            yield Finding(OK, title, f"{size / GB:.3g} GB are read now, tensor by tensor")
        names = (name for file in stored for name in stored_dtypes(files.flag, files.name, file))
        dtype, wanted = DTYPES[run.args.dtype], names_of_weights(names, parameter_sizes(config))
        tensors = ((name, tensor) for file in stored for name, tensor in stored_tensors(file) if name in wanted)
        if bad := first_not_finite_weight(tensors, dtype):
            yield Finding.of_error(FAILURE, title, not_finite(files.flag, files.name, *bad, dtype))
        else:
            yield Finding(OK, title, f"finite in {run.args.dtype}")


def _why_not_read(stored: list[Path], size: int, left: float) -> str | None:
    """Returns why weight files of that many bytes are not read, to add to a finding; None if they are. left: how many
    bytes may still be read.
    """
    if size > left:
        return f"the models together have more than {MOST_READ / GB:.3g} GB"
    for file in stored:
        is_old = file.suffix != ".safetensors" and not zipfile.is_zipfile(file)
        if is_old and file.stat().st_size > MOST_IN_MEMORY:
            return f"{file.name} is of an old format, which is held in memory as a whole"
    return None


def names_of_weights(stored: Iterable[str], parameters: Collection[str]) -> set[str]:
    """Returns the names of the stored tensors that a model's weights are made of: all that are named like its
    `parameters`, without what else there is, such as masks. Where one has no tensor of its name, because transformers
    renames or joins what is stored, all may be.
    """
    names = set(stored)
    own = {name for name in names if is_parameter(name, parameters)}
    return own if all(is_parameter(name, own) for name in parameters) else names


def stored_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """Yields the tensors of a weight file by name, one in memory at a time."""
    if file.suffix == ".safetensors":
        with safe_open(file, framework="pt") as opened:
            for name in list(opened.keys()):
                yield name, opened.get_tensor(name)
    else:
        yield from torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file)).items()


def first_not_finite_weight(tensors: Iterator[tuple[str, Tensor]], dtype: torch.dtype) -> tuple[str, float] | None:
    """Returns name and value of the first of `tensors` with one that is NaN, or infinite in `dtype`; None if there is
    none.
    """
    for name, tensor in tensors:
        if not tensor.numel() or not tensor.is_floating_point():
            continue
        low, high = (value.item() for value in tensor.aminmax())  # both NaN if any value is
        most = torch.finfo(dtype).max
        if math.isnan(low):
            return name, low
        if low < -most or high > most:
            return name, math.copysign(math.inf, high if high > most else low)
    return None


def check_logits(run: PlannedRun) -> Iterator[Finding]:
    """Asks a small teacher about a text, as a run asks its teacher about the first batch."""
    teacher = small_teacher(run)
    if teacher is None:
        return
    title = "teacher's logits"
    with torch.no_grad():
        logits = teacher(probe_ids(run, teacher.device), use_cache=False).logits  # (1, N, V)
    if n_bad := count_not_finite(logits, None):
        found = f"not finite for {n_bad} of {logits.shape[1]} tokens of a text, though all weights are"
        remedy = "copy the teacher's config.json again, take another teacher, or try --dtype float32"
        yield Finding(FAILURE, title, found, remedy)
    else:
        yield Finding(OK, title, "finite for a text in several scripts")


def probe_ids(run: PlannedRun, device: torch.device) -> Tensor:
    """Returns the ids of a text in several scripts, (1, N)."""
    ids = Encoder(teacher_tokenizer(run), separator_of(run).token)([PROBE])
    return torch.from_numpy(ids.astype("int64")).to(device)[None]


@functools.cache
def small_teacher(run: PlannedRun) -> PreTrainedModel | None:
    """Loads the teacher, in the run's dtype; None if it is not small or does not run. Raises CheckSkipped if it is not
    there, and ValueError if it cannot be loaded.
    """
    if not run.args.has_teacher:
        return None
    skeleton, _ = skeletons(run)
    if sum(p.numel() for p in skeleton.parameters()) > SMALL_MODEL:
        return None
    return get_teacher_model(teacher_place(run, needs_weights=True), DTYPES[run.args.dtype], run_device())
