"""Fixtures for every test: one thread, process groups and loggers restored afterwards, and, on request, the environment
of a plain run. Slow files are collected first.
"""

import logging
import os
import socket
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist

# The files that take longest, in `make test`'s order: of two workers, neither should end up alone with one of these.
SLOW_FILES = [
    *["test_faults.py", "test_footprint.py", "test_train_script.py", "test_restarts.py", "test_demo.py"],
    *["test_readme_commands.py", "test_evaluator.py", "test_plan.py", "test_lm_eval.py", "test_harness.py"],
    *["test_data.py", "test_eval_script.py", "test_eval_resume.py", "test_fused_loss.py", "test_export.py"],
    *["test_scoring.py", "test_generation.py", "test_security.py"],
    *["test_exchanges.py", "test_align_runs.py", "test_auto.py"],
]

RANK_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: SLOW_FILES.index(item.path.name) if item.path.name in SLOW_FILES else len(SLOW_FILES))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Uses one thread: small models gain nothing from more, and lose much where other programs use the cores."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_process_group_is_left():
    """Destroys the groups that a failed run leaves to the end of its process; here the process lives on."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(autouse=True)
def loggers_as_they_were():
    """Restores the loggers, which an entry sets up for good, and closes the handlers that a test has added."""
    loggers = [logging.getLogger(name) for name in ("train", "llamba")]
    before = [(log.level, log.propagate, log.handlers[:]) for log in loggers]
    yield
    for log, (level, propagate, handlers) in zip(loggers, before, strict=True):
        for handler in set(log.handlers) - set(handlers):
            handler.close()
        log.setLevel(level)
        log.propagate, log.handlers = propagate, handlers


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Gives the test its own cache of `datasets`, and returns the folder."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    return tmp_path / "hf"


@pytest.fixture
def no_torchrun():
    """Gives the test the environment of a plain `python` run."""
    with mock.patch.dict(os.environ):
        for name in RANK_NAMES:
            os.environ.pop(name, None)
        yield


@pytest.fixture
def no_network(monkeypatch):
    """Fails a test that connects to anything. A library's thread that an earlier test has left behind may."""
    connect, own_thread = socket.socket.connect, threading.current_thread()

    def refuse(*args):
        if threading.current_thread() is own_thread:
            pytest.fail("touched the network")
        return connect(*args)

    monkeypatch.setattr("socket.socket.connect", refuse)
