"""How an entry ends: its exit code, and one line for a signal or for what a user can correct."""

import signal
import threading
import time
from types import SimpleNamespace

import pytest

from processes import exits
from processes.exits import SIGNALS, Interrupted, run_entry


@pytest.fixture
def slept(monkeypatch):
    """Returns the seconds that this thread would have slept. Threads that earlier tests left behind do sleep."""
    seconds, sleep, here = [], time.sleep, threading.current_thread()

    def listed(s):
        seconds.append(s) if threading.current_thread() is here else sleep(s)

    monkeypatch.setattr(exits, "time", SimpleNamespace(sleep=listed))
    monkeypatch.delenv("RANK", raising=False)
    return seconds


def refuse_layers():
    raise ValueError("--layers 1 9: out of range")


def test_an_entry_that_ends_well(slept, capsys):
    assert run_entry(lambda: None) == 0
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("code", [0, 1, 75, 76])
def test_the_code_of_main_is_the_entrys(slept, capsys, code):
    assert run_entry(lambda: code) == code
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def handlers():
    """Restores the signal handlers: an entry that ends by a signal ignores those that follow."""
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGUSR1"])
def test_a_signal_ends_an_entry_with_one_line(capsys, handlers, name):
    def main():
        signal.raise_signal(getattr(signal, name))
        pytest.fail("it went on")

    assert run_entry(main) == 75
    assert {signal.getsignal(number) for number in SIGNALS} == {signal.SIG_IGN}  # torchrun may send it again
    signal.raise_signal(getattr(signal, name))
    assert capsys.readouterr() == ("", f"stopped by {name}\n")


def test_an_entry_that_ends_well_leaves_signals_as_they_were():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    assert run_entry(lambda: 0) == 0
    assert {number: signal.getsignal(number) for number in SIGNALS} == before


def test_a_signal_is_not_taken_for_an_error_on_its_way_out(handlers):
    """Code that catches every Exception must not catch it."""

    def main():
        try:
            signal.raise_signal(signal.SIGTERM)
        except Exception:
            pytest.fail("caught as an Exception")

    assert run_entry(main) == 75
    assert not issubclass(Interrupted, Exception)


def test_what_a_user_can_put_right_is_one_line(slept, capsys):
    assert run_entry(refuse_layers) == 2
    assert capsys.readouterr() == ("", "error: --layers 1 9: out of range\n")
    assert slept == []


@pytest.mark.parametrize("rank,waits", [("0", False), ("1", True), ("3", True)])
def test_rank_0_is_given_time_to_speak(slept, monkeypatch, rank, waits):
    monkeypatch.setenv("RANK", rank)
    assert run_entry(refuse_layers) == 2
    assert bool(slept) is waits
    assert all(seconds >= 5 for seconds in slept)


@pytest.mark.parametrize("error", [FloatingPointError, RuntimeError, KeyError, KeyboardInterrupt])
def test_other_errors_keep_their_traceback(slept, error):
    def main():
        raise error("deep inside")

    with pytest.raises(error, match="deep inside"):
        run_entry(main)
    assert slept == []
