"""What holds for every test: one thread, and what it leaves behind is taken down. Which files come first. And the
environment of a plain run, for those that ask.
"""

import logging
import os
from unittest import mock

import pytest
import torch
import torch.distributed as dist

# From half a minute up. Of two that test side by side, none shall be left alone with one of these at the end.
SLOW_FILES = [
    *["test_demo.py", "test_faults.py", "test_train_script.py", "test_memory_plan.py", "test_restarts.py"],
    *["test_plan.py", "test_evaluation.py", "test_lm_eval.py", "test_model_utils.py", "test_harness.py"],
    *["test_eval_resume.py", "test_export.py", "test_fused_loss.py"],
]

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW_FILES.index(item.path.name) if item.path.name in SLOW_FILES else len(SLOW_FILES))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small gain nothing from threads, and lose much where other programs use the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """A run that fails leaves its groups to the end of its process; here the process goes on."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """An entry that runs in this process sets up logging for good."""
    loggers = [logging.getLogger(name) for name in ("train", "llamba")]
    before = [(log.level, log.propagate, log.handlers[:]) for log in loggers]
    yield
    for log, (level, propagate, handlers) in zip(loggers, before, strict=True):
        log.setLevel(level)
        log.propagate, log.handlers = propagate, handlers


@pytest.fixture
def no_torchrun():
    """The environment of a plain `python` run, restored afterwards."""
    with mock.patch.dict(os.environ):
        for name in RANK_NAMES:
            os.environ.pop(name, None)
        yield
