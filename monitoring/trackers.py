"""Charts of the rows of metrics.jsonl: a run in Weights & Biases, online or to be sent later, and TensorBoard's files.
Both show one history of a run, however often it is resumed: no optimizer step is missing and none appears twice.

An online run is resumed under its id, which <output_dir>/wandb_id keeps; W&B has rows up to some step, and gets those
after it. An offline run cannot be resumed: W&B writes a new directory each time, and `wandb sync` of a run that was not
begun with `resume` replaces what the server has under its id. So the newest directory gets the whole history, and older
ones are moved to wandb/earlier.
"""

import contextlib
import dataclasses
import importlib.util
import logging
import secrets
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import TimeoutError
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from arguments import TrainArguments
from checkpointing.small_files import identity
from monitoring.layer_errors import errors_by_layer, mean_error
from paths import readable
from utils import BackgroundThread, finite

logger = logging.getLogger("train")

MetricsRow = dict[str, Any]
Rows = Callable[[], list[MetricsRow]]
UPLOAD_WAIT_S, UPLOAD_WAIT_AFTER_ERROR_S = 330.0, 10.0  # for W&B at the end, a little more than its own limit

X_AXES = ("step", "micro_step", "tokens")
OF_SPEED = ("tokens_per_s", "step_time_s", "teacher_wait_s", "data_wait_s", "mfu", "memory_gb")
# What of a chart stands in W&B's table of runs, besides its last value.
BEST = {
    "min": [
        "train/loss",
        "train/ce",
        "train/kl",
        "eval/loss",
        "eval/ce",
        "eval/kl",
        "eval/perplexity",
        "alignment/mean",
    ],
    "max": ["eval/agreement", "eval/mmlu", "speed/mfu", "speed/memory_gb"],
}
WITHOUT_SERVER = ("offline", "dryrun", "disabled")  # modes whose runs W&B cannot resume on its server


class Tracker(Protocol):
    """Shows a run's rows. Whatever it raises, training continues without it."""

    name: str

    def write(self, row: MetricsRow) -> None: ...

    def close(self, status: str, failed: bool) -> None: ...


def flat(row: MetricsRow) -> dict[str, float]:
    """Returns the numbers of a row by the names of their charts: `train/loss`, `speed/mfu`, `eval/kl`,
    `layer_map/own/00`, `alignment/02` for the error of layer 2. Leaves out what is not a finite number.
    """
    groups: MetricsRow = {"train": {}, "speed": {}}
    if errors := errors_by_layer(row):
        groups["alignment"] = finite({"mean": mean_error(errors), **{f"{i:02d}": e for i, e in errors.items()}})
    for name, value in finite(row).items():
        if name == "alignment":
            continue
        if isinstance(value, dict) or name in X_AXES:
            groups[name] = value
        else:
            groups["speed" if name in OF_SPEED else "train"][name] = value
    return dict(_leaves("", groups))


def _leaves(name: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, list):
        value = {f"{index:02d}": inner for index, inner in enumerate(value)}
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(f"{name}/{key}" if name else key, inner)
    elif isinstance(value, (int, float)):
        yield name, value


def check_trackers(args: TrainArguments) -> None:
    """Raises ValueError if --tensorboard or --wandb is given and cannot work here."""
    if args.tensorboard:
        check_package("--tensorboard", "tensorboard")
        check_folder("--tensorboard", Path(args.output_dir) / "tensorboard")
    if args.wandb:
        check_wandb(args)


def check_package(flag: str, package: str) -> None:
    """Raises ValueError if a package that an option needs is not installed."""
    if importlib.util.find_spec(package) is None:
        raise ValueError(f"{flag}: the package {package} is not installed; pip install {package}, or leave it out")


def check_folder(flag: str, folder: Path) -> None:
    """Raises ValueError if a file is where a folder has to be, or if that cannot be known."""
    with readable(f"{flag}: {folder}", folder, "let this user read --output_dir, or choose another"):
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{flag}: {folder} is no directory, expected one or nothing; move it away")


def check_wandb(args: TrainArguments) -> None:
    """Logs in to W&B if the run needs that. Raises ValueError if it cannot."""
    check_package("--wandb", "wandb")
    check_folder("--wandb", Path(args.output_dir) / "wandb")
    if wandb_mode(args) in WITHOUT_SERVER:
        return
    import wandb  # takes a second, and only some runs want it

    try:
        wandb.login(verify=True)
    except wandb.Error as error:
        raise _no_wandb(error) from error


def start_trackers(args: TrainArguments, rows: Rows, step: int) -> list[Tracker]:
    """Starts what the options ask for. rows: returns those of the run so far, now up to `step`. Raises ValueError."""
    folder = Path(args.output_dir)
    trackers: list[Tracker] = []
    if args.wandb:
        trackers.append(WandbRun(args, rows(), is_resumed=step > 0 or (folder / "checkpoint-0").is_dir()))
    if args.tensorboard:
        trackers.append(TensorBoard(folder / "tensorboard", rows, step))
    return trackers


# --- Weights & Biases ----------------------------------------------------------------------------------------


class WandbRun:
    """Shows a run in Weights & Biases."""

    name = "W&B"

    def __init__(self, args: TrainArguments, kept: list[MetricsRow], is_resumed: bool) -> None:
        """is_resumed: a run that was in this directory before is the same one."""
        self.run = _start_wandb(args, is_resumed)
        self.next_step = self.run.starting_step  # W&B has those before it
        self.thread = BackgroundThread("wandb")  # a long history that is sent again must not hold up training
        self.error: Exception | None = None  # the first of the thread
        self.last: MetricsRow = {}
        self.best: MetricsRow = {}
        for row in kept:
            self.write(row)

    def write(self, row: MetricsRow) -> None:
        self.last = row
        loss = finite(row.get("eval", {}).get("loss"))
        if loss is not None and (not self.best or loss <= self.best["eval"]["loss"]):
            self.best = row
        if self.error is not None:
            raise self.error
        if row["step"] >= self.next_step:
            self.thread.submit(partial(self._log, flat(row), row["step"]))

    def _log(self, charts: dict[str, float], step: int) -> None:
        if self.error is None:
            try:
                self.run.log(charts, step=step, commit=True)
            except Exception as error:  # raised where the next row is written
                self.error = error

    def close(self, status: str, failed: bool) -> None:
        end = self.thread.submit(partial(self._end, status, failed))
        # The other ranks wait meanwhile, and without a network W&B may never return.
        try:
            end.result(timeout=UPLOAD_WAIT_AFTER_ERROR_S if failed else UPLOAD_WAIT_S)
        except TimeoutError:
            logger.warning("W&B has not taken all of the run; send the rest with `wandb sync`")

    def _end(self, status: str, failed: bool) -> None:
        self.run.summary.update({"status": status, "final_loss": finite(self.last.get("loss"))})
        if self.best:
            self.run.summary.update({"best_eval_loss": self.best["eval"]["loss"], "best_eval_step": self.best["step"]})
        self.run.finish(exit_code=int(failed))


def _start_wandb(args: TrainArguments, is_resumed: bool):
    import wandb

    mode, folder = wandb_mode(args), Path(args.output_dir)
    remembered = folder / "wandb_id"
    is_resumed = is_resumed and remembered.is_file()
    run_id = remembered.read_text().strip() if is_resumed else secrets.token_hex(4)
    for earlier in (folder / "wandb").glob(f"offline-run-*-{run_id}"):
        (folder / "wandb" / "earlier").mkdir(exist_ok=True)
        earlier.rename(folder / "wandb" / "earlier" / earlier.name)
    try:
        run = wandb.init(
            project=args.wandb_project,
            name=args.wandb_run_name,
            entity=args.wandb_entity,
            mode=mode,
            dir=str(folder),
            config=dataclasses.asdict(args),
            id=run_id,
            resume=None if mode in WITHOUT_SERVER else "allow",
            settings=wandb.Settings(finish_timeout=300),
        )
    except wandb.Error as error:
        raise _no_wandb(error, remembered if is_resumed else None) from error
    if not run.disabled:
        remembered.write_text(run_id + "\n")
    run.define_metric("step", hidden=True)
    run.define_metric("*", step_metric="step")
    for kind, names in BEST.items():
        for name in names:
            run.define_metric(name, step_metric="step", summary=f"{kind},last")
    return run


def wandb_mode(args: TrainArguments) -> Any:
    if args.wandb_mode or args.local_files_only:
        return args.wandb_mode or "offline"
    import wandb

    return wandb.setup().settings.mode  # by WANDB_MODE, or as `wandb offline` has left it


def _no_wandb(error: Exception, remembered: Path | None = None) -> ValueError:
    remedy = "check the network and `wandb login`, or give --wandb_mode offline and send the run later"
    if remembered is not None:
        remedy += f"; without {remembered} it would be a new run"
    return ValueError(f"--wandb: W&B does not start ({error}); {remedy}")


# --- TensorBoard ---------------------------------------------------------------------------------------------


class TensorBoard:
    """Writes TensorBoard's files."""

    name = "TensorBoard"

    def __init__(self, folder: Path, rows: Rows, step: int) -> None:
        """rows: returns those of the run so far, now up to `step`."""
        self.folder, self.rows = folder, rows
        has_rows = folder.is_dir()
        self._open(step + 1)  # the run repeats later steps
        if not has_rows:
            self._add(rows())

    def write(self, row: MetricsRow) -> None:
        if self._is_gone():
            with contextlib.suppress(Exception):  # what it still holds has no folder to go to
                self.writer.close()
            self._open(0)
            self._add(earlier for earlier in self.rows() if earlier["step"] < row["step"])
        self._add([row])

    def _is_gone(self) -> bool:
        """Returns whether the folder was removed during the run; not where that cannot be found out now."""
        with contextlib.suppress(OSError):
            return identity(self.folder) != self.place
        return False

    def _open(self, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # an optional package, and slow to import

        self.writer = SummaryWriter(str(self.folder), purge_step=purge_step)
        self.place = identity(self.folder)

    def _add(self, rows: Iterable[MetricsRow]) -> None:
        for row in rows:
            charts = flat(row)
            for name in charts.keys() - {"step"}:
                self.writer.add_scalar(name, charts[name], row["step"])

    def close(self, status: str, failed: bool) -> None:
        self.writer.close()
