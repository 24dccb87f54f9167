"""The progress of an evaluation, on a terminal and without one."""

import sys

from evaluation import progress
from evaluation.pieces import Piece
from evaluation.progress import Progress


def test_without_a_terminal_the_progress_is_logged(monkeypatch, caplog):
    monkeypatch.setattr(progress, "LOG_INTERVAL_S", -1.0)
    caplog.set_level("INFO", logger="train")
    bar = Progress(100, is_main=True)
    bar.began -= 60
    bar.advance("teacher", Piece("mmlu-tools", 25, lambda scorer: None))
    bar.close()
    assert caplog.messages == ["teacher: 25%, about 3 min left"]
    quiet = Progress(100, is_main=False)
    quiet.advance("teacher", Piece("mmlu-tools", 25, lambda scorer: None))
    assert len(caplog.messages) == 1


def test_a_terminal_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    bar = Progress(100, is_main=True)
    bar.advance("teacher", Piece("mmlu-tools", 25, lambda scorer: None))
    bar.bar.refresh()
    bar.close()
    assert "teacher mmlu-tools  25%|" in capsys.readouterr().err
