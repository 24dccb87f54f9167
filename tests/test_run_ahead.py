"""utils.run_ahead: it draws a few items ahead in a thread, and ends that thread."""

import time

import pytest

from tests.text.documents import ahead_threads
from utils import run_ahead


def test_run_ahead_draws_before_it_is_asked_but_not_without_bound():
    drawn = []
    ahead = run_ahead((drawn.append(i) or i for i in range(100)), depth=4)
    assert next(ahead) == 0
    deadline = time.monotonic() + 10
    while len(drawn) < 6 and time.monotonic() < deadline:  # one taken, four waiting, one in hand
        time.sleep(0.01)
    time.sleep(0.2)
    assert len(drawn) == 6
    assert list(ahead) == list(range(1, 100))
    assert ahead_threads() == 0


def test_run_ahead_raises_the_threads_error_after_what_came_before():
    def items():
        yield 1
        raise ValueError("row 7")

    ahead = run_ahead(items(), depth=4)
    assert next(ahead) == 1
    with pytest.raises(ValueError, match="row 7"):
        next(ahead)
    assert ahead_threads() == 0


def test_run_ahead_ends_its_thread_when_the_consumer_breaks_off():
    for i in run_ahead(iter(range(10**9)), depth=2):
        if i == 3:
            break
    assert ahead_threads() == 0
