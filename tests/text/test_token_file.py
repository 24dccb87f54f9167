"""text/token_file.py: windows and files are exactly what the documents say, whatever happens to the builder."""

import contextlib
import functools
import os
import pickle
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader

from data import PackedTextDataset
from tests import fresh
from tests.text.documents import (
    plain_ids,
    random_documents,
    small_tokenizer,
)
from text import token_file
from text.encoding import Encoder, text_batches
from text.token_file import write_token_file


def write(directory: Path, documents: list[str]) -> None:
    write_token_file(directory, documents, Encoder(small_tokenizer()), {"made": "here"})


def stored_ids(directory: Path) -> list[int]:
    return [int(window[0]) for window in PackedTextDataset(directory, seq_len=0)]


@pytest.mark.parametrize("seed", range(4))
def test_windows_joined_are_the_documents_joined(tmp_path: Path, seed: int, monkeypatch: pytest.MonkeyPatch):
    small_batches = functools.partial(text_batches, max_rows=7)
    monkeypatch.setattr(token_file, "text_batches", small_batches)  # many batches: their order counts
    documents = random_documents(seed, n=60)
    write(tmp_path / "packed", documents)
    expected = plain_ids(documents)
    for seq_len in (1, 8, 61):
        windows = PackedTextDataset(tmp_path / "packed", seq_len)
        assert len(windows) == len(expected) // (seq_len + 1)
        assert all(window.shape == (seq_len + 1,) and window.dtype == torch.int64 for window in windows)
        assert torch.cat(list(windows)).tolist() == expected[: len(windows) * (seq_len + 1)]


def test_token_file_says_what_it_is_made_from(tmp_path: Path):
    write(tmp_path / "packed", ["a", "b"])
    about = (tmp_path / "packed" / "about.json").read_text()
    assert '"documents": 2' in about and '"tokens": 4' in about and '"made": "here"' in about


def test_failed_build_leaves_nothing(tmp_path: Path):
    def documents():
        yield from ["a"] * 5000
        raise RuntimeError("disk gone")

    with pytest.raises(RuntimeError, match="disk gone"):
        write(tmp_path / "packed", documents())
    assert list(tmp_path.iterdir()) == []


def test_two_builders_at_once_leave_one_whole_file(tmp_path: Path):
    documents = random_documents(1, 20)
    both_halfway = threading.Barrier(2)

    def build() -> None:
        def texts():
            yield from documents[:10]
            both_halfway.wait(timeout=30)
            yield from documents[10:]

        write(tmp_path / "packed", texts())

    builders = [threading.Thread(target=build) for _ in range(2)]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join()
    assert stored_ids(tmp_path / "packed") == plain_ids(documents)
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_what_killed_builders_left_is_removed_but_not_the_work_of_a_live_one(tmp_path: Path):
    for name in ("dead", "live"):
        (tmp_path / f"packed.partial-{name}").mkdir()
        (tmp_path / f"packed.partial-{name}" / "tokens.bin").write_bytes(b"12")
    long_ago = time.time() - token_file.ABANDONED_AFTER_S - 60
    for path in (tmp_path / "packed.partial-dead", tmp_path / "packed.partial-dead" / "tokens.bin"):
        os.utime(path, (long_ago, long_ago))
    os.utime(tmp_path / "packed.partial-live", (long_ago, long_ago))  # only its file is being written
    write(tmp_path / "packed", ["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "packed.partial-live"]


def test_a_clock_that_jumps_removes_no_live_build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    long_ago = time.time() - 2 * token_file.ABANDONED_AFTER_S

    def texts():
        yield from ["a"] * 5000
        for partial in tmp_path.glob("first.partial-*"):
            for path in (partial / "tokens.bin", partial):
                os.utime(path, (long_ago, long_ago))
        write(tmp_path / "second", ["a"])
        yield "b"

    write(tmp_path / "first", texts())
    assert len(stored_ids(tmp_path / "first")) == 2 * 5001
    (tmp_path / "third.partial-unlocked").mkdir()
    monkeypatch.setattr(token_file.time, "time", lambda: -10 * long_ago)  # not the clock of the disk
    write(tmp_path / "third", ["a"])
    monkeypatch.setattr(token_file.time, "time", lambda: 10 * long_ago)
    write(tmp_path / "fourth", ["a"])
    assert (tmp_path / "third.partial-unlocked").exists()


def test_of_what_is_only_named_like_a_build_nothing_is_lost(tmp_path: Path):
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "tokens.bin").write_bytes(b"12")
    os.utime(tmp_path / "precious" / "tokens.bin", (0, 0))
    os.utime(tmp_path / "precious", (0, 0))
    (tmp_path / "packed.partial-link").symlink_to(tmp_path / "precious")
    (tmp_path / "packed.partial-nowhere").symlink_to(tmp_path / "nowhere")
    (tmp_path / "packed.partial-file").write_text("kept")
    write(tmp_path / "packed", ["a"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["packed", "packed.partial-file", "precious"]
    assert (tmp_path / "precious" / "tokens.bin").read_bytes() == b"12"


def test_damaged_token_file_is_refused(tmp_path: Path):
    write(tmp_path / "packed", ["abc"])
    os.truncate(tmp_path / "packed" / "tokens.bin", 2)
    with pytest.raises(ValueError, match="2 bytes, which is not 4 uint16; delete"):
        PackedTextDataset(tmp_path / "packed", 1)


def test_windows_travel_to_a_worker_without_the_file(tmp_path: Path):
    documents = random_documents(2, 300)
    write(tmp_path / "packed", documents)
    windows = PackedTextDataset(tmp_path / "packed", 8)
    pickled = pickle.dumps(windows)
    assert len(pickled) < 1000 < len(plain_ids(documents))
    assert torch.equal(pickle.loads(pickled)[3], windows[3])
    with pytest.raises(IndexError):
        windows[len(windows)]


def test_no_documents_give_no_windows(tmp_path: Path):
    write(tmp_path / "packed", [])
    assert len(PackedTextDataset(tmp_path / "packed", 8)) == 0


def run_times() -> dict[str, int]:
    """Returns how long each thread of this process has run, in ns."""
    times = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError):  # one may have ended meanwhile
            times[task.name] = int((task / "schedstat").read_text().split()[0])
    return times


def busy_threads(folder: Path) -> int:
    """Returns how many threads, other than Python's, had a part in packing a file."""
    documents = random_documents(0, 20_000)
    write(folder / "first", documents[:100])
    list(DataLoader(range(4), num_workers=1))  # its worker is forked, behind the tokenizer's back
    before = run_times()
    write(folder / "second", documents)
    ours = {str(thread.native_id) for thread in threading.enumerate()}
    spent = [time - before.get(task, 0) for task, time in run_times().items() if task not in ours]
    return sum(time > 0.05 * sum(spent) for time in spent)


def test_packing_keeps_the_tokenizers_threads_beside_forked_workers(tmp_path: Path):
    """In a forked process the tokenizer silently has one thread, so packing must not happen there."""
    # of three, should a busy machine let one of them sleep
    assert fresh.call(busy_threads, tmp_path, RAYON_NUM_THREADS="3") >= 2
