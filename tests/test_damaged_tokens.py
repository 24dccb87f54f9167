"""A cache of tokens that is not what was written trains no student: a small one is found out before a model is loaded,
a large one before the first checkpoint, and all ranks end with one error.
"""

import functools
import json
import sys
import threading
from pathlib import Path

import pytest

import distillation.models
import train_gpus
from arguments import parse_train_args
from checkpointing.saver import Saver
from data import build_dataloader
from model_utils import get_tokenizer
from tests import fresh
from tests.small_runs import make_models, options
from text import token_check


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return make_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def argv(models, tmp_path):
    """Returns the options of a run whose tokens are all zero."""
    argv = options(models, tmp_path / "out", dataset_cache_dir=tmp_path / "cache", max_steps=4)
    tokenizer = get_tokenizer("--teacher_model", str(models / "teacher"))
    build_dataloader(parse_train_args(argv), tokenizer, rank=0, world_size=1, is_builder=True)
    (tokens,) = tmp_path.glob("cache/packed/*/tokens.bin")
    tokens.write_bytes(bytes(tokens.stat().st_size))
    return argv


def test_a_small_cache_is_checked_before_a_model_is_loaded(argv, tmp_path, monkeypatch):
    for loader in ("get_student_model", "get_teacher_model"):
        monkeypatch.setattr(distillation.models, loader, lambda *a, **k: pytest.fail("a model was loaded"))
    monkeypatch.setattr(sys, "argv", ["train_gpus.py", *argv])
    with pytest.raises(ValueError, match="tokens.bin is not what was written"):
        train_gpus.main()


def read_while_saving(at_step: int, rank: int) -> None:
    """Has the tokens read in the background, and only while the state of a micro step from `at_step` on is saved."""
    token_check.AT_ONCE = 0
    read, save, is_saving = token_check._read, Saver.save, threading.Event()

    def save_and_say(saver, state):
        save(saver, state)
        if state.micro_step >= at_step:
            is_saving.set()

    token_check._read = lambda *args: is_saving.wait(timeout=120) and read(*args)
    Saver.save = save_and_say


@pytest.mark.parametrize("save_interval,at_step", [(1, 1), (100, 4)], ids=["during the run", "at its end"])
def test_a_large_cache_is_checked_before_a_checkpoint_is_written(argv, tmp_path, save_interval: int, at_step: int):
    argv += ["--save_interval", str(save_interval)]
    codes, log = fresh.ranks(argv, 2, arm=functools.partial(read_while_saving, at_step))
    assert codes == [2, 2], log
    assert log.count("error: ") == 1 and "tokens.bin is not what was written" in log and "Traceback" not in log
    assert f"micro_step {at_step} " in log, "no update waits for the check"
    out = tmp_path / "out"
    assert [path.name for path in sorted(out.glob("checkpoint-*"))] == ["checkpoint-0"]
    assert json.loads((out / "status.json").read_text())["status"] == "refused"


@pytest.mark.parametrize("save_interval,n_ranks", [(2, 2), (100, 1)])
def test_a_checkpoint_waits_for_the_check_of_a_whole_cache(argv, tmp_path: Path, save_interval: int, n_ranks: int):
    """And holds the hash that was found."""
    (tokens,) = tmp_path.glob("cache/packed/*/tokens.bin")
    (tokens.parent / "about.json").unlink()
    tokens.unlink()
    tokens.parent.rmdir()
    argv += ["--save_interval", str(save_interval)]
    codes, log = fresh.ranks(argv, n_ranks, arm=functools.partial(read_while_saving, min(save_interval, 4)))
    assert codes == [0] * n_ranks, log
    (data,) = tmp_path.glob(f"out/checkpoint-4/data-00001-of-0000{n_ranks}.json")
    recorded = json.loads((tokens.parent / "about.json").read_text())["sha256"]
    assert json.loads(data.read_text()) == {"windows": 8 * n_ranks, "tokens": recorded}
