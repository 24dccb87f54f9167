"""Weights & Biases and TensorBoard: one history of a run that is stopped and resumed, read back from the files they
leave; no network is touched, and nothing that goes wrong there ends a run.
"""

import json
import socket
import struct
import sys
import threading
import time
from concurrent.futures import Future

import pytest
import wandb
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from checkpointing.run_folder import write_status
from monitoring import trackers
from monitoring.run_log import RunLog
from monitoring.trackers import check_trackers, flat
from tests.parsing import options_in
from tests.small_runs import read_metrics
from utils import setup_logging


def row(step, **changes):
    figures = {"loss": 3 - step / 10, "kl": 1.25, "ce": 2.375, "lr": 1e-5, "grad_norm": 0.5, "tokens": 64 * step}
    speed = {"tokens_per_s": 12345.6, "step_time_s": 0.1, "teacher_wait_s": 0.02}
    evaluated = {"eval": {"loss": abs(step - 4) + 1.5, "seconds": 2.0}} if step % 2 == 0 else {}
    return {"step": step, "micro_step": 2 * step, **figures, **speed, **evaluated, **changes}


def run_steps(args, first, last, **changes):
    """Logs the steps `first` to `last` of a run that resumes from the step before."""
    with RunLog(args, 2 * (first - 1), is_main=True, step=first - 1) as log:
        for step in range(first, last + 1):
            log.write(row(step, **changes))


def test_rows_become_charts():
    nested = {"eval": {"kl": 0.5, "mmlu": {"acc": 0.25}}, "update_health": {"mixers": 0.9}}
    nested["layer_map"] = {"own": [0.1, None, 0.3], "method": "text"}
    charts = flat(row(3, loss=float("nan"), mfu=0.4, memory_gb=51.2, skipped_updates=1, **nested))
    assert charts["train/kl"] == 1.25 and charts["train/skipped_updates"] == 1 and "train/loss" not in charts
    assert charts["speed/mfu"] == 0.4 and charts["speed/memory_gb"] == 51.2 and charts["speed/step_time_s"] == 0.1
    assert (charts["step"], charts["micro_step"], charts["tokens"]) == (3, 6, 192)
    assert charts["eval/kl"] == 0.5 and charts["eval/mmlu/acc"] == 0.25 and charts["update_health/mixers"] == 0.9
    assert {name: value for name, value in charts.items() if name.startswith("layer_map")} == {
        "layer_map/own/00": 0.1,
        "layer_map/own/02": 0.3,
    }


# --- Weights & Biases ----------------------------------------------------------------------------------------


@pytest.fixture
def no_network(monkeypatch, tmp_path):
    """Keeps the sockets of this process on this machine, and gives W&B's own process a server here. Returns the
    server's listening socket, which nothing should connect to.
    """
    connect = socket.socket.connect

    def refuse(self, address):
        if self.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise AssertionError(f"a connection to {address}")
        return connect(self, address)

    with socket.create_server(("127.0.0.1", 0)) as ear:
        ear.setblocking(False)
        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{ear.getsockname()[1]}")
        monkeypatch.setenv("WANDB_SILENT", "true")
        monkeypatch.setenv("HOME", str(tmp_path))  # where a login would be
        monkeypatch.delenv("NETRC", raising=False)
        for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_DIR"):
            monkeypatch.delenv(name, raising=False)
        wandb.teardown()  # what another test's environment has settled
        yield ear
        wandb.teardown()
        with pytest.raises(BlockingIOError):
            ear.accept()


def records(file):
    """Returns the records of a W&B file. It has blocks of 32 KiB with pieces of records, each behind a checksum, a
    length and a kind.
    """
    data, place, whole = file.read_bytes(), 7, b""
    while place + 7 <= len(data):
        room = 32768 - place % 32768
        if room < 7:
            place += room
            continue
        length, kind = struct.unpack("<HB", data[place + 4 : place + 7])
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # whole, or the last of its pieces
            yield Record.FromString(whole)
            whole = b""


def history(file):
    """Returns each step with its charts."""
    found = []
    for record in records(file):
        if record.HasField("history"):
            items = {item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
            found.append((record.history.step.num, items))
    return found


def summary(file):
    updates = (update for record in records(file) if record.HasField("summary") for update in record.summary.update)
    return {update.key or "/".join(update.nested_key): json.loads(update.value_json) for update in updates}


def test_a_resumed_offline_run_has_one_whole_history(tmp_path, no_network):
    """The newest directory has it all, so that `wandb sync DIR/wandb/offline-run-*` sends one run."""
    args = options_in(tmp_path, "--wandb", "--local_files_only", "--wandb_run_name", "mine")
    run_steps(args, 1, 5)
    run_id = (tmp_path / "wandb_id").read_text().strip()
    (first,) = (tmp_path / "wandb").glob("offline-run-*")
    assert first.name.endswith(run_id)
    time.sleep(1.1)  # W&B names directories by the second
    write_status(tmp_path, "complete", 0)
    run_steps(args, 4, 6)  # from a checkpoint at step 3
    wandb.teardown()  # as at the end of a process: W&B's own one writes what it still holds

    (newest,) = (tmp_path / "wandb").glob("offline-run-*")
    assert [path.name for path in (tmp_path / "wandb" / "earlier").iterdir()] == [first.name] != [newest.name]
    (file,) = newest.glob("*.wandb")
    steps = history(file)
    assert [step for step, _ in steps] == [items["step"] for _, items in steps] == [1, 2, 3, 4, 5, 6]
    assert [items["train/loss"] for _, items in steps] == [row(step)["loss"] for step in range(1, 7)]
    assert steps[3][1]["eval/loss"] == 1.5
    run = next(record.run for record in records(file) if record.HasField("run"))
    assert (run.run_id, run.display_name, run.project, run.resume) == (run_id, "mine", "llamba-distill", False)
    assert "seq_length" in {item.key for item in run.config.update}
    found = summary(file)
    assert (found["status"], found["best_eval_loss"], found["best_eval_step"]) == ("complete", 1.5, 4)
    assert found["final_loss"] == row(6)["loss"] and found["train/loss"] == {"min": 2.4, "last": 2.4}


def test_disabled_wandb_leaves_nothing(tmp_path, no_network):
    run_steps(options_in(tmp_path, "--wandb", "--wandb_mode", "disabled"), 1, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert len(read_metrics(tmp_path)) == 2


class Run:
    """Stands for a run of W&B: records its calls."""

    disabled = False

    def __init__(self, starting_step):
        self.starting_step, self.summary, self.logged, self.exit_code = starting_step, {}, [], None

    def define_metric(self, name, **how):
        pass

    def log(self, charts, step, commit):
        assert commit  # or the row would wait for the next
        self.logged.append(step)

    def finish(self, exit_code):
        self.exit_code = exit_code


@pytest.fixture
def played(monkeypatch):
    """Returns (runs, calls): each wandb.init returns the next of the runs and adds its arguments to the calls."""
    runs, calls = [], []

    def init(**how):
        calls.append(how)
        return runs[len(calls) - 1]

    monkeypatch.setattr(wandb, "init", init)
    return runs, calls


def test_an_online_run_gets_what_it_has_not(tmp_path, played):
    """The run had reached step 5 and resumes from step 3; W&B has 2 steps of it, or 7."""
    runs, calls = played
    runs += [Run(0), Run(3), Run(8)]
    args = options_in(tmp_path, "--wandb", "--wandb_mode", "online")
    run_steps(args, 1, 5)
    run_steps(args, 4, 5)
    run_steps(args, 4, 9)
    assert [run.logged for run in runs] == [[1, 2, 3, 4, 5], [3, 4, 5], [8, 9]]
    assert [how["resume"] for how in calls] == ["allow"] * 3
    assert {how["id"] for how in calls} == {(tmp_path / "wandb_id").read_text().strip()}


def test_another_run_in_the_same_directory_is_another_run(tmp_path, played):
    """A run that begins at 0 is another, unless it resumes from checkpoint-0."""
    runs, calls = played
    runs += [Run(0), Run(0), Run(0)]
    args = options_in(tmp_path, "--wandb", "--wandb_mode", "online")
    run_steps(args, 1, 2)
    run_steps(args, 1, 2)
    (tmp_path / "checkpoint-0").mkdir()
    run_steps(args, 1, 2)
    first, second, third = (how["id"] for how in calls)
    assert first != second == third


@pytest.mark.parametrize("mode", ["offline", "online"])
def test_offline_directories_of_a_resumed_run_are_set_aside(tmp_path, played, mode):
    """They are set aside in both modes: sent later, they would replace what W&B has by then."""
    runs, calls = played
    runs += [Run(0), Run(0)]
    run_steps(options_in(tmp_path, "--wandb", "--wandb_mode", "offline"), 1, 2)
    run_id = (tmp_path / "wandb_id").read_text().strip()
    for name in (f"offline-run-20260101_000000-{run_id}", "offline-run-20260101_000000-other", f"run-1-{run_id}"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    run_steps(options_in(tmp_path, "--wandb", "--wandb_mode", mode), 2, 3)
    assert [path.name for path in (tmp_path / "wandb" / "earlier").iterdir()] == [
        f"offline-run-20260101_000000-{run_id}"
    ]
    assert len(list((tmp_path / "wandb").iterdir())) == 3
    assert calls[1]["resume"] == (None if mode == "offline" else "allow")


@pytest.mark.parametrize("error,exit_code", [(None, 0), (KeyboardInterrupt, 1)])
def test_wandb_learns_how_the_run_ended(tmp_path, played, error, exit_code):
    runs, _ = played
    runs.append(Run(0))
    write_status(tmp_path, "stopped", 75)

    def work():
        with RunLog(options_in(tmp_path, "--wandb"), 0, is_main=True):
            if error:
                raise error

    if error:
        with pytest.raises(error):
            work()
    else:
        work()
    assert runs[0].exit_code == exit_code
    assert runs[0].summary == {"status": "failed" if error else "stopped", "final_loss": None}


def test_a_wandb_that_does_not_come_back_holds_up_no_failing_run(tmp_path, played, monkeypatch):
    """The other ranks wait for its end."""
    runs, _ = played
    runs.append(Run(0))
    never, real = threading.Event(), Future.result
    runs[0].finish = lambda exit_code: never.wait(60)
    waited = []

    def wait_less(self, timeout=None):
        waited.append(timeout)
        return real(self, timeout and 0.1)

    monkeypatch.setattr(Future, "result", wait_less)
    with pytest.raises(KeyError), RunLog(options_in(tmp_path, "--wandb"), 0, is_main=True):
        raise KeyError
    assert waited == [10.0]
    never.set()


def test_nor_a_run_that_is_complete(tmp_path, played, monkeypatch, capsys):
    runs, calls = played
    runs.append(Run(0))
    never = threading.Event()
    runs[0].finish = lambda exit_code: never.wait(60)
    monkeypatch.setattr("monitoring.trackers.UPLOAD_WAIT_S", 0.1)
    setup_logging(None, is_main=True)
    with RunLog(options_in(tmp_path, "--wandb"), 0, is_main=True) as log:
        log.write(row(1))
    assert "W&B has not taken all of the run; send the rest with `wandb sync`" in capsys.readouterr().err
    assert calls[0]["settings"].finish_timeout < 330
    never.set()


def test_online_without_a_login_is_reported_before_training(tmp_path, no_network, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # nobody to ask
    args = options_in(tmp_path, "--wandb", "--wandb_mode", "online")
    with pytest.raises(ValueError, match="--wandb: W&B does not start .*wandb login.*--wandb_mode offline"):
        check_trackers(args)
    with pytest.raises(ValueError, match="--wandb: W&B does not start"):
        RunLog(args, 0, is_main=True)
    check_trackers(options_in(tmp_path, "--wandb", "--local_files_only"))  # needs none
    check_trackers(options_in(tmp_path, "--wandb", "--wandb_mode", "disabled"))


def test_a_run_that_wandb_refuses_to_resume_names_the_file_of_its_id(tmp_path, monkeypatch):
    (tmp_path / "wandb_id").write_text("abcd1234\n")

    def refuse(**how):
        assert how["id"] == "abcd1234"
        raise wandb.errors.CommError("that run was deleted")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(ValueError, match=r"that run was deleted.*without \S+/wandb_id it would be a new run"):
        RunLog(options_in(tmp_path, "--wandb", "--wandb_mode", "online"), 2, is_main=True, step=1)


def test_what_breaks_during_the_run_does_not_end_it(tmp_path, played, capsys):
    runs, _ = played
    runs.append(Run(0))

    def break_once(charts, step, commit):
        if step == 1:
            raise ConnectionResetError("W&B's process is gone")

    runs[0].log = break_once
    setup_logging(None, is_main=True)
    with RunLog(options_in(tmp_path, "--wandb", "--log_interval", "100"), 0, is_main=True) as log:
        thread = log.outputs[-1].thread
        log.write(row(1))
        log.outputs[-1].write(row(2))  # before anybody has looked what became of the first
        thread.submit(lambda: None).result(timeout=60)
        log.write(row(2))
        log.write(row(3))
    assert len(read_metrics(tmp_path)) == 3
    said = [line for line in capsys.readouterr().err.splitlines() if "W&B" in line]
    assert said == ["[train] W&B: ConnectionResetError: W&B's process is gone; it gets no more rows"]
    assert runs[0].exit_code is None


def test_without_wandb_and_tensorboard_neither_is_imported(tmp_path, monkeypatch):
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    check_trackers(options_in(tmp_path))
    run_steps(options_in(tmp_path), 1, 1)
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("package", ["wandb", "tensorboard"])
def test_a_package_that_is_not_there_is_reported_before_training(tmp_path, monkeypatch, package):
    real = trackers.importlib.util.find_spec
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None if name == package else real(name))
    with pytest.raises(ValueError, match=f"--{package}: .*pip install {package}"):
        check_trackers(options_in(tmp_path, f"--{package}", "--local_files_only"))


# --- TensorBoard ---------------------------------------------------------------------------------------------


def scalars(folder, name):
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(name)]


def test_tensorboard_has_each_step_once(tmp_path):
    began = time.time()
    args = options_in(tmp_path, "--tensorboard")
    run_steps(args, 1, 5)
    run_steps(args, 4, 6, lr=2e-5)  # from a checkpoint at step 3
    assert scalars(tmp_path, "train/lr") == [*((step, 1e-5) for step in (1, 2, 3)), *((n, 2e-5) for n in (4, 5, 6))]
    assert scalars(tmp_path, "eval/loss") == [(2, 3.5), (4, 1.5), (6, 3.5)]
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("speed/tokens_per_s")
    assert all(began <= event.wall_time <= time.time() for event in events)


def test_tensorboard_that_is_asked_for_later_has_the_steps_before(tmp_path):
    run_steps(options_in(tmp_path), 1, 3)
    run_steps(options_in(tmp_path, "--tensorboard"), 3, 4)
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2, 3, 4]


def test_another_run_in_the_same_directory_has_its_own_curve(tmp_path):
    for _ in range(2):
        run_steps(options_in(tmp_path, "--tensorboard"), 1, 2)
    assert [step for step, _ in scalars(tmp_path, "train/loss")] == [1, 2]
