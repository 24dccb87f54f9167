"""What holds for every test: one thread, and what it leaves behind is taken down. And which files come first."""

import logging

import pytest
import torch
import torch.distributed as dist

# From a minute up. Of two that test side by side, none shall be left alone with one of these at the end.
SLOW_FILES = ["test_train_script.py", "test_demo.py", "test_memory_plan.py", "test_model_utils.py"]


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
