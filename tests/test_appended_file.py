"""Files that lines are appended to: what happens to the lines when the file, its folder or the disk fails."""

import contextlib
import logging
import os
import shutil
import threading
from pathlib import Path

import pytest

from appended_file import AppendedFile, LogFile


def all_that_lacks(before, now):
    return before.removeprefix(now)


@pytest.fixture
def file(tmp_path, caplog, monkeypatch):
    """Returns an open file with one line."""
    monkeypatch.setattr(logging.getLogger("train"), "propagate", True)
    file = AppendedFile(tmp_path / "runs" / "rows", all_that_lacks)
    file.append(b"1\n")
    yield file
    file.close()


def remove(path):
    path.unlink()


def remove_the_folder(path):
    shutil.rmtree(path.parent)


def make_the_folder_anew(path):
    shutil.rmtree(path.parent)
    path.parent.mkdir()


def move(path):
    path.rename(path.with_name("moved"))


def replace(path):
    path.with_name("new").write_bytes(b"")
    path.with_name("new").replace(path)


@pytest.mark.parametrize("trouble", [remove, remove_the_folder, make_the_folder_anew, move, replace])
def test_a_file_that_is_gone_is_made_again_with_all_that_it_had(file, caplog, trouble):
    trouble(file.path)
    file.append(b"2\n")
    file.append(b"3\n")
    assert file.path.read_bytes() == b"1\n2\n3\n"
    assert len(caplog.messages) == 1 and "during the run: opened again, 1 line(s) restored" in caplog.text


def test_a_file_that_is_gone_when_it_is_flushed_is_restored_too(file):
    file.path.unlink()
    file.flush_to_disk()
    assert file.path.read_bytes() == b"1\n"


def test_what_another_file_in_its_place_has_already_is_not_repeated(file):
    file.append(b"2\n3")
    copy = file.path.with_name("copy")
    copy.write_bytes(b"1\n2")  # a copy that was made meanwhile
    copy.replace(file.path)
    file.append(b"\n4\n")
    assert file.path.read_bytes() == b"1\n2\n\n3\n4\n"  # its last line was cut short, and stays alone


def test_lines_wait_for_a_place_that_cannot_be_written(file, caplog):
    file.path.unlink()
    file.path.mkdir()
    for line in (b"2\n", b"3\n"):
        file.append(line)
    assert caplog.text.count("rows cannot be written (Is a directory); its lines are kept") == 1
    file.path.rmdir()
    file.append(b"4\n")
    assert file.path.read_bytes() == b"1\n2\n3\n4\n"


def test_flushing_writes_what_waits_and_reports_a_disk_that_fails(file, caplog, monkeypatch):
    file.unwritten = b"2\n"
    file.flush_to_disk()
    assert file.path.read_bytes() == b"1\n2\n" and not caplog.messages

    def fail(descriptor):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(os, "fsync", fail)
    file.flush_to_disk()
    assert caplog.text.count("rows cannot be written (Input/output error)") == 1


def test_a_file_whose_old_content_cannot_be_read_begins_anew(file, caplog, monkeypatch):
    """As on a network's disk, where another machine has removed it."""

    def fail(file):
        raise OSError(116, "Stale file handle")

    monkeypatch.setattr("appended_file.content_of", fail)
    file.path.unlink()
    file.append(b"2\n")
    assert file.path.read_bytes() == b"2\n" and "0 line(s) restored" in caplog.text


def test_without_lines_there_is_no_file(tmp_path):
    file = AppendedFile(tmp_path / "rows")
    file.append()
    file.flush_to_disk()
    file.close()
    assert list(tmp_path.iterdir()) == []


# --- the log file --------------------------------------------------------------------------------------------


@pytest.fixture
def log(tmp_path):
    """Returns a logger of its own with a log file."""
    log = logging.Logger("train")
    log.addHandler(LogFile(tmp_path / "logs" / "run.txt"))
    yield log
    for handler in log.handlers:
        handler.close()


def test_a_log_that_was_moved_away_is_followed_by_a_new_one(tmp_path, log, monkeypatch):
    """As logrotate moves it: the old lines are in the old file, and not in both."""
    monkeypatch.setattr("appended_file.logger", log)
    file = tmp_path / "logs" / "run.txt"
    log.info("first %s", "\udcff")  # a path that is not UTF-8
    file.rename(tmp_path / "moved")
    log.info("second")
    shutil.rmtree(file.parent)
    log.info("third")
    assert (tmp_path / "moved").read_text() == "first \\udcff\n"
    *warning, third = file.read_text().splitlines()
    assert third == "third" or warning == ["third"]
    assert file.read_text().count("removed, moved or replaced") == 1


def test_a_log_on_a_full_disk_gives_no_traceback(log, capsys, monkeypatch):
    monkeypatch.setattr("appended_file.logger", log)
    (handler,) = log.handlers
    handler.file.path = handler.file.path.with_name("full")
    handler.file.path.symlink_to("/dev/full")
    log.info("a line")
    log.info("another")
    assert capsys.readouterr() == ("", "")
    handler.file.path.unlink()
    log.info("room again")
    lines = handler.file.path.read_text().splitlines()
    assert [line for line in lines if "full" not in line] == ["a line", "another", "room again"]


def test_arguments_that_do_not_fit_their_text_are_reported_by_logging(log, capsys):
    log.info("%d", "text")
    assert "--- Logging error ---" in capsys.readouterr().err


@pytest.mark.parametrize("device", ["/dev/null", "/dev/stderr"])
def test_a_log_may_be_a_device(device, capfd):
    log = logging.Logger("train")
    log.addHandler(LogFile(Path(device)))
    log.info("a line")
    log.handlers[0].close()
    assert capfd.readouterr().err == ("" if device == "/dev/null" else "a line\n")


def test_two_handlers_that_warn_at_once_do_not_wait_for_each_other(tmp_path, monkeypatch):
    """Each writes in a thread of its own, and warns while it does: the warning goes to the other, which is busy."""
    log, both_write = logging.getLogger("busy handlers"), threading.Barrier(2)
    handlers = [LogFile(tmp_path / name) for name in ("one", "two")]
    append = AppendedFile.append

    def warn_and_append(file, lines):
        if b"first" in lines:
            with contextlib.suppress(threading.BrokenBarrierError):  # where one waits until the other has written
                both_write.wait(timeout=0.5)
            log.warning("from %s", file.path.name)
        append(file, lines)

    monkeypatch.setattr(AppendedFile, "append", warn_and_append)
    monkeypatch.setattr(log, "handlers", handlers)
    record = logging.makeLogRecord({"msg": "first"})
    threads = [threading.Thread(target=handler.handle, args=[record], daemon=True) for handler in handlers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert not any(thread.is_alive() for thread in threads)
    for handler in handlers:
        lines = sorted(handler.file.path.read_text().splitlines())
        assert lines == ["first", "from one", "from two"]
        handler.close()
