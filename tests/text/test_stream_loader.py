"""text/stream_loader.py: batches packed on the fly are the documents' own, in order, and ranks stop together."""

import ctypes
import dataclasses
from pathlib import Path

import datasets
import pytest
import torch.distributed as dist

from tests import fresh
from tests.text.documents import (
    ahead_threads,
    expected_windows,
    ids_of,
    loader,
    options,
    packed_dirs,
    plain_ids,
    random_documents,
    record_encoded,
    windows_of,
    write_jsonl,
)
from tests.waiting import wait_until
from text import encoding


@pytest.mark.parametrize("seed", range(3))
def test_streaming_gives_the_windows_of_the_documents_in_order(tmp_path: Path, seed: int):
    documents = random_documents(seed, 50)
    batches = loader(options(write_jsonl(tmp_path / "a.jsonl", documents), dataset_streaming=True))
    expected = expected_windows(documents)
    assert windows_of(batches) == expected[: len(expected) // 2 * 2]
    with pytest.raises(TypeError):
        len(batches)
    assert not packed_dirs(tmp_path)


@pytest.mark.parametrize("n_files", [1, 3])  # a share is every W-th document, or where they divide, whole files
@pytest.mark.parametrize("world_size", [2, 3])
def test_streaming_ranks_read_disjoint_documents(tmp_path: Path, n_files: int, world_size: int):
    documents = [f"{i:04d}" + "." * 30 for i in range(60)]  # each makes one window of 35 ids
    for i in range(n_files):
        write_jsonl(tmp_path / "dir" / f"{i}.jsonl", documents[i::n_files])
    args = options(tmp_path / "dir", dataset_streaming=True, shuffle_buffer=10, seq_length=34, batch_size=1)
    shares = [windows_of(loader(args, rank, world_size)) for rank in range(world_size)]
    assert sorted(sum(shares, [])) == sorted(plain_ids([document]) for document in documents)


def test_streaming_without_a_shuffle_buffer_keeps_the_order_in_every_epoch(tmp_path: Path):
    documents = random_documents(6, 40)
    for i in range(4):
        write_jsonl(tmp_path / "dir" / f"{i}.jsonl", documents[10 * i : 10 * (i + 1)])
    batches = loader(options(tmp_path / "dir", dataset_streaming=True, batch_size=1, epochs=3))
    assert windows_of(batches) == expected_windows(documents) * 3


def test_streaming_shuffles_by_seed_and_epoch(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(6, 60))

    def orders(seed: int) -> list[str]:
        args = options(path, dataset_streaming=True, shuffle_buffer=20, seed=seed, epochs=2)
        batches = list(loader(args))
        border = [batch.position.epoch for batch in batches].index(1)
        assert 0 < border < len(batches) - 1
        return [str(windows_of(batches[:border])), str(windows_of(batches[border:]))]

    assert len({*orders(0), *orders(1)}) == 4
    assert orders(0) == orders(0)


def test_streams_number_their_windows_from_the_start_of_an_epoch(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(encoding.text_batches, "__defaults__", (9, 1 << 22))
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(5, 60))
    args = options(path, dataset_streaming=True, epochs=2)
    for rank in range(2):
        epoch = ids_of(loader(dataclasses.replace(args, epochs=1), rank, 2))
        assert epoch == list(range(len(epoch))) and len(epoch) > 8
        assert ids_of(loader(args, rank, 2)) == epoch * 2


# ---- threads and ranks


def test_streaming_tokenises_the_next_texts_while_batches_of_the_last_are_used(tmp_path: Path, monkeypatch):
    documents = random_documents(1, 60)
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    monkeypatch.setattr(encoding.text_batches, "__defaults__", (20, 1 << 22))
    encoded = record_encoded(monkeypatch)
    batches = iter(loader(options(path, dataset_streaming=True)))
    next(batches)
    wait_until(lambda: len(encoded) > 20)
    batches.close()
    assert ahead_threads() == 0


def test_streaming_error_in_the_thread_reaches_the_consumer_and_no_thread_stays(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [*["a b c"] * 3000, 7])
    batches = loader(options(path, dataset_streaming=True))
    with pytest.raises(ValueError, match="row 3000 as read here holds int"):
        list(batches)
    next(iter(batches))
    assert ahead_threads() == 0


HELD: list = []


def hold_a_stream(path: Path) -> None:
    HELD.append(iter(loader(options(path, dataset_streaming=True))))
    next(HELD[0])
    ctypes.pythonapi.Py_Exit(0)  # an interpreter's way to end, which a fork does not take by itself


def test_a_process_that_never_closes_a_stream_ends(tmp_path: Path):
    with fresh.started(hold_a_stream, write_jsonl(tmp_path / "a.jsonl", ["ab" * 50] * 40)) as holder:
        holder.process.join(timeout=60)
        assert holder.process.exitcode == 0, holder.written()


def test_streaming_ranks_do_not_agree_at_every_step(tmp_path: Path, monkeypatch):
    """Agreeing means to wait for the slowest rank. Ranks do so only when one of them needs more text."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    agreements = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **more: agreements.append(1) or all_reduce(*args, **more))
    monkeypatch.setattr(encoding.text_batches, "__defaults__", (20, 1 << 22))
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(1, 60))
    batches = list(loader(options(path, dataset_streaming=True), control_group=dist.group.WORLD))
    assert len(agreements) == 3 + 1 < len(batches)  # one for every 20 documents, one at the end


def read_two_shares(folder: Path, path: Path, rank: int) -> list:
    """Returns the numbers of batches in three passes, and checks that a share that fills no batch is an error."""
    datasets.config.HF_DATASETS_CACHE = folder / "hf"
    dist.init_process_group("gloo", f"file://{folder}/store", rank=rank, world_size=2)
    args = options(path, dataset_streaming=True)
    batches = loader(args, rank, 2, control_group=dist.group.WORLD)
    counts = [len(list(batches)), len(list(batches))]
    encoding.text_batches.__defaults__ = (3, 1 << 22)  # so that ranks need more text at different steps
    counts.append(len(list(batches)))
    with pytest.raises(ValueError, match="too small"):
        list(loader(dataclasses.replace(args, batch_size=50), rank, 2, control_group=dist.group.WORLD))
    dist.destroy_process_group()
    return counts


def test_streaming_ranks_whose_shares_differ_stop_together(tmp_path: Path):
    # every second document is long, so rank 1 has much more to read
    path = write_jsonl(tmp_path / "a.jsonl", ["ab" * 9, "ab" * 50] * 20)
    args = options(path, dataset_streaming=True)
    alone = [len(list(loader(args, rank, 2))) for rank in range(2)]
    assert alone[0] < alone[1] - 5
    work = [(read_two_shares, tmp_path, path, rank) for rank in range(2)]
    with fresh.started(*work[0]) as first, fresh.started(*work[1]) as second:
        assert first.result(timeout=60) == second.result(timeout=60) == [alone[0]] * 3
