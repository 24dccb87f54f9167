"""The folder that a student is in while it is made. Every file in it is written whole, and a conversion that was killed
at any moment resumes behind the last layer that it had finished. When all is there, the folder gets its name.
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from inputs.model_files import one_line
from utils import flush_to_disk, lock_dir, write_whole

MADE_WITH = "made_with.json"  # all that decides what the student becomes
PROGRESS = "progress.safetensors"  # hidden states behind the last finished layer
FIGURES = "conversion.json"  # stands in the finished student
LOCK = ".lock"


class UnfinishedStudent:
    """Holds the folder `<output>.unfinished`, new or of an earlier process that did not get to the end."""

    def __init__(self, output: Path, made_with: dict[str, Any], n_shards: int) -> None:
        self.output, self.made_with, self.n_shards = output, made_with, n_shards
        self.folder = unfinished_folder(output)

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keeps the folder for this process. Raises ValueError if it is of another conversion, or another process has
        it.
        """
        check_output(self.output, self.made_with)
        with lock_dir("--output", self.folder), self._explaining_write_errors():
            if not any((self.folder / name).exists() for name in (MADE_WITH, FIGURES)):
                self.write_json(MADE_WITH, self.made_with)
            yield

    @contextlib.contextmanager
    def _explaining_write_errors(self) -> Iterator[None]:
        """Turns an OSError of writing into a ValueError of one line."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"--output {self.output}: {self.folder} cannot be written ({error.strerror}); make room, or correct "
                "this, and give the same command to resume"
            ) from error

    def write_json(self, name: str, content: Any) -> None:
        write_whole(self.folder / name, json.dumps(content, indent=2).encode() + b"\n")

    def shard_name(self, number: int) -> str:
        return f"model-{number + 1:05d}-of-{self.n_shards:05d}.safetensors"

    def write_shard(self, number: int, tensors: dict[str, Tensor]) -> None:
        """Writes the tensors of shard `number`, from 0."""
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_whole(self.folder / self.shard_name(number), save(contiguous, metadata={"format": "pt"}))

    def write_index(self) -> None:
        """Writes which shard has which tensor, from the shards themselves."""
        weight_map, total = {}, 0
        for number in range(self.n_shards):
            with safe_open(self.folder / self.shard_name(number), "pt") as shard:
                for name in list(shard.keys()):
                    weight_map[name] = self.shard_name(number)
                    total += shard.get_tensor(name).nbytes
        self.write_json("model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})

    def save_progress(self, tensors: dict[str, Tensor], figures: dict[str, Any]) -> None:
        """Records what the next layer begins with, once the shard of the one before is on the disk."""
        content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        write_whole(self.folder / PROGRESS, save(content, metadata={"figures": json.dumps(figures)}))

    @property
    def has_progress(self) -> bool:
        return (self.folder / PROGRESS).exists()

    def progress(self, device: torch.device) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Returns what was last saved as progress, or None. Raises ValueError if it, or a shard, is damaged or gone."""
        if not self.has_progress:
            return None
        with (
            one_line(f"--output {self.output}: {self.folder} is damaged", "delete that folder, and start again"),
            safe_open(self.folder / PROGRESS, "pt") as opened,
        ):
            tensors = {name: opened.get_tensor(name).to(device, copy=True) for name in list(opened.keys())}
            figures = json.loads(opened.metadata()["figures"])
        n_done = len(figures["errors"]) + 1  # the embedding, and a layer each
        check_shards(self.output, self.folder, [self.folder / self.shard_name(number) for number in range(n_done)])
        return tensors, figures

    def publish(self) -> None:
        """Gives the finished student its name."""
        for file in list(self.folder.iterdir()):
            if file.name in (PROGRESS, MADE_WITH) or _is_passing(file):
                file.unlink()
        for file in [*self.folder.iterdir(), self.folder]:  # the libraries' files too
            flush_to_disk(file)
        self.folder.rename(self.output)
        flush_to_disk(self.output.parent)


def check_shards(output: Path, folder: Path, files: list[Path]) -> None:
    """Raises ValueError if one of these files in the `folder` of a student is gone, or is shorter than it says."""
    with one_line(f"--output {output}: {folder} is damaged", "delete that folder, and start again"):
        for file in files:
            with safe_open(file, "pt"):  # which compares them
                pass


def unfinished_folder(output: Path) -> Path:
    """Returns where a student is until it is finished. Raises ValueError for a path without a name."""
    if not output.name:
        raise ValueError(f"--output {output}: has no name of its own; give the name of a new folder")
    return output.with_name(f"{output.name}.unfinished")


def problem_of_new(output: Path) -> str | None:
    """Returns why a finished student could not be given this name; None if it can."""
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        return f"--output {output}: is there already and holds something else; give the name of a new folder"
    if output.is_symlink():  # which no folder can replace
        return f"--output {output}: is a link; give the name of a new folder, such as where it leads"
    return None


def _made_with(folder: Path) -> dict[str, Any]:
    """Returns what an unfinished student is made with, which its figures have too once they are there."""
    if (folder / MADE_WITH).exists():
        return json.loads((folder / MADE_WITH).read_text(encoding="utf-8"))
    return json.loads((folder / FIGURES).read_text(encoding="utf-8"))["made_with"]


def _is_passing(file: Path) -> bool:
    """Returns whether a file says nothing of a student: the lock, or part of a file whose writing was killed."""
    return file.name == LOCK or (file.name.startswith(".") and file.name.endswith(".partial"))


def finished_figures(output: Path, made_with: dict[str, Any]) -> dict[str, Any] | None:
    """Returns the figures of a student that was made with the same before, or None."""
    for folder in (output, unfinished_folder(output)):  # killed when only the name was missing
        with contextlib.suppress(OSError, ValueError, TypeError):
            content = json.loads((folder / FIGURES).read_text(encoding="utf-8"))
            if content.get("made_with") == made_with:
                return content
    return None


def check_output(output: Path, made_with: dict[str, Any]) -> None:
    """Raises ValueError unless that folder is free, and any student there, finished or not, is made with the same.

    made_with: all of it, or what is known before teacher and text are read.
    """
    folder = unfinished_folder(output)
    try:
        if is_finished := (output / FIGURES).is_file():
            folder = output
        elif problem := problem_of_new(output):
            raise ValueError(problem)
        elif not folder.exists() or all(map(_is_passing, folder.iterdir())):
            return
        different = differences(_made_with(folder), made_with)
    except (FileNotFoundError, AttributeError, LookupError, TypeError, json.JSONDecodeError) as error:
        raise ValueError(
            f"--output {output}: {folder} is no student of make_student.py; move it away, or give another name"
        ) from error
    except OSError as error:
        raise ValueError(f"--output {output}: cannot be read ({error.strerror}); give another folder") from error
    if different:
        what = f"{'made' if is_finished else 'begun'} with {', '.join(different.values())}"
        words = f"--output {output}: {folder} was {what}"
        if is_finished and list(different) == ["layers"]:
            raise ValueError(
                f"{words}; only what was measured differs, and train_gpus.py can put any --layers into this student; "
                "to measure these, give another name"
            )
        remedy = "give the same to use it" if is_finished else "give the same to resume it, delete it"
        raise ValueError(f"{words}; {remedy}, or give another name")


def differences(earlier: dict[str, Any], now: dict[str, Any]) -> dict[str, str]:
    """Returns name -> words for each part of `now` that was other earlier. A teacher may have its name alone."""
    found = {
        name: f"--{name} {_words(earlier.get(name))} (now {_words(value)})"
        for name, value in {**dict.fromkeys(earlier), **now}.items()
        if name not in ("teacher", "text") and earlier.get(name) != value
    }
    before, teacher = earlier["teacher"], now["teacher"]
    if before["name"] != teacher["name"]:
        found["teacher"] = f"--teacher_model {before['name']} (now {teacher['name']})"
    elif any(before.get(name) != value for name, value in teacher.items()):
        found["teacher"] = f"other files of --teacher_model {teacher['name']}"
    if earlier.get("text") != now.get("text", earlier.get("text")):
        found["text"] = "other text (--calibration and its options)"
    return found


def _words(value: Any) -> str:
    return (" ".join(map(str, value)) or "-1") if isinstance(value, list) else str(value)
