"""data.py: cached or streaming, any number of ranks sees the documents' own windows, once, and resumes exactly."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

import data
from data import build_dataloader
from tests import fresh
from tests.text.documents import (
    EOS,
    SEQ,
    ahead_threads,
    expected_windows,
    ids_of,
    loader,
    options,
    packed_dirs,
    place_behind,
    random_documents,
    record_encoded,
    small_tokenizer,
    windows_of,
    write_jsonl,
)
from tests.waiting import wait_until
from text import encoding

pytestmark = pytest.mark.usefixtures("own_cache")


# ---- batches, ranks, epochs


def test_a_batch_is_inputs_and_what_follows_them(tmp_path: Path):
    batch = next(iter(loader(options(write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))))))
    assert batch.input_ids.shape == batch.labels.shape == batch.loss_mask.shape == (2, SEQ)
    assert torch.equal(batch.input_ids[:, 1:], batch.labels[:, :-1])
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.loss_mask.dtype == torch.bool and batch.loss_mask.all()
    assert batch.input_ids.is_contiguous() and batch.labels.is_contiguous()


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("seed", [0, 1])
def test_cached_ranks_share_out_every_window_once(tmp_path: Path, world_size: int, seed: int):
    documents = random_documents(seed, 47)
    args = options(write_jsonl(tmp_path / "a.jsonl", documents), seed=seed)
    ranks = [loader(args, rank, world_size) for rank in range(world_size)]
    seen = [windows_of(rank) for rank in ranks]
    expected = expected_windows(documents)
    steps = len(expected) // (2 * world_size)
    assert [len(rank) for rank in ranks] == [steps] * world_size
    assert [len(windows) for windows in seen] == [2 * steps] * world_size
    # Windows may be equal by chance, so their numbers are compared.
    positions = [i for rank in ranks for i in ids_of(rank)]
    assert len(set(positions)) == len(positions) == steps * 2 * world_size
    assert sorted(w for rank in seen for w in rank) == sorted(expected[i] for i in positions)


def test_the_global_order_does_not_depend_on_the_number_of_ranks(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(3, 60))
    alone = [windows_of([batch]) for batch in loader(options(path, batch_size=6))]
    for world_size in (2, 3):
        args = options(path, batch_size=6 // world_size)
        ranks = [loader(args, rank, world_size) for rank in range(world_size)]
        assert [sum(map(windows_of, ([b] for b in step)), []) for step in zip(*ranks, strict=True)] == alone


def test_epochs_and_seeds_differ_and_repeat(tmp_path: Path):
    documents = random_documents(4, 60)
    path, n = write_jsonl(tmp_path / "a.jsonl", documents), len(expected_windows(documents))
    orders = {seed: ids_of(loader(options(path, seed=seed, epochs=2, batch_size=1))) for seed in (0, 1)}
    epochs = [order[start : start + n] for order in orders.values() for start in (0, n)]
    assert len({str(epoch) for epoch in epochs}) == 4
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert ids_of(loader(options(path, seed=1, epochs=2, batch_size=1))) == orders[1]
    assert ids_of(loader(options(path, seed=1, batch_size=1))) == orders[1][:n]  # more epochs are more of the same


def test_a_micro_step_may_end_one_epoch_and_begin_another(tmp_path: Path):
    """So only the last windows of the whole order can be left over, fewer than one micro step takes."""
    documents = random_documents(4, 60)
    path, n = write_jsonl(tmp_path / "a.jsonl", documents), len(expected_windows(documents))
    one_by_one = ids_of(loader(options(path, epochs=3, batch_size=1)))
    batch_size = next(size for size in range(4, 10) if n % size)
    batches = loader(options(path, epochs=3, batch_size=batch_size))
    assert len(batches) == 3 * n // batch_size > 3 * (n // batch_size)
    assert ids_of(batches) == one_by_one[: len(batches) * batch_size]
    expected = expected_windows(documents)
    assert windows_of(batches) == [expected[i] for i in one_by_one[: len(batches) * batch_size]]


def test_a_batch_names_its_windows(tmp_path: Path):
    """Cached, by their numbers in the token file."""
    documents = random_documents(4, 60)
    expected = expected_windows(documents)
    for workers in (0, 1):
        args = options(write_jsonl(tmp_path / "a.jsonl", documents), dataset_workers=workers)
        loader(args)  # makes the file
        batches = list(loader(args, rank=1, world_size=2))
        assert windows_of(batches) == [expected[i] for i in ids_of(batches)]
        assert [batch.position.windows for batch in batches] == [4 * (k + 1) for k in range(len(batches))]


def test_a_batch_keeps_its_place_and_names_when_its_tensors_change(tmp_path: Path):
    batch = next(iter(loader(options(write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))))))
    changed = batch.with_tensors(lambda tensor: tensor + 1)
    assert (changed.position, changed.window_ids) == (batch.position, batch.window_ids)
    assert torch.equal(changed.input_ids, batch.input_ids + 1)


def test_too_little_text(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", ["a" * (5 * (SEQ + 1))])
    with pytest.raises(ValueError, match="5 windows, but one micro step needs 6 .--batch_size 3 x 2 ranks"):
        loader(options(path, batch_size=3), rank=0, world_size=2)
    with pytest.raises(ValueError, match="fewer than the 6 windows of one batch .seen from rank 0"):
        list(loader(options(path, batch_size=6, dataset_streaming=True)))


def test_special_token_strings_in_documents_are_text(tmp_path: Path):
    document = f"a{EOS}b" * 20
    for streaming in (False, True):
        args = options(write_jsonl(tmp_path / "a.jsonl", [document]), dataset_streaming=streaming, batch_size=1)
        windows = windows_of(loader(args))
        assert sorted(windows) == sorted(expected_windows([document]))


# ---- resuming


def seen(batches) -> list[tuple]:
    """Returns all that a run can see of batches."""
    return [(windows_of([batch]), list(batch.window_ids), place_behind(batch)) for batch in batches]


@pytest.mark.parametrize(
    "form",
    [
        {"dataset_streaming": False},
        {"dataset_streaming": True, "shuffle_buffer": 0},
        {"dataset_streaming": True, "shuffle_buffer": 20},
    ],
    ids=["cached", "in order", "shuffled"],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_from_the_place_behind_any_batch_comes_exactly_the_rest(tmp_path: Path, monkeypatch, form, world_size: int):
    """Across the border of two epochs, and from places in a run that was itself resumed."""
    monkeypatch.setattr(encoding.text_batches, "__defaults__", (9, 1 << 22))  # several stacks in an epoch
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(5, 60))
    args = options(path, epochs=2, seq_length=150, **form)
    for rank in range(world_size):
        whole = seen(loader(args, rank, world_size))
        half = len(whole) // 2  # where, or one beside it, the second epoch begins
        for k in {0, 1, 4, 9, half - 2, half - 1, half, half + 1, half + 5, len(whole) - 2, len(whole) - 1}:
            rest = seen(loader(args, rank, world_size, position=whole[k][2]))
            assert rest == whole[k + 1 :], k
        rest = seen(loader(args, rank, world_size, position=whole[4][2]))
        assert seen(loader(args, rank, world_size, position=rest[3][2])) == rest[4:]


def test_a_resumed_loader_can_be_read_twice(tmp_path: Path):
    for form in ({"dataset_streaming": False}, {"dataset_streaming": True, "shuffle_buffer": 20}):
        args = options(write_jsonl(tmp_path / "a.jsonl", random_documents(5, 60)), epochs=2, seq_length=60, **form)
        whole = seen(loader(args))
        batches = loader(args, position=whole[2][2])
        assert seen(batches) == seen(batches) == whole[3:]


def test_the_end_of_the_data_is_a_place_too(tmp_path: Path):
    for form in ({"dataset_streaming": False}, {"dataset_streaming": True}):
        args = options(write_jsonl(tmp_path / "a.jsonl", random_documents(5, 30)), epochs=2, **form)
        *_, last = loader(args)
        assert list(loader(args, position=place_behind(last))) == []


def sha256_of(packed: Path) -> str:
    return hashlib.sha256((packed / "tokens.bin").read_bytes()).hexdigest()


def test_a_place_is_small_and_plain(tmp_path: Path):
    """Every checkpoint holds it. Cached, it is a number of windows and the hash of their file; in a stream, texts of
    the buffer and ids that fill no window yet.
    """
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(5, 60))
    batches = loader(options(path))
    assert place_behind(next(iter(batches))) == {"windows": 2, "tokens": sha256_of(packed_dirs(tmp_path)[0])}
    place = place_behind(next(iter(loader(options(path, dataset_streaming=True, shuffle_buffer=20)))))
    assert place.keys() == {"epoch", "texts", "leftover", "first_step", "n_taken"}
    assert len(place["leftover"]) < 2 * (SEQ + 1)


@pytest.mark.parametrize(
    "legs",
    [
        [(2, 2, 3), (3, 2, 2), (1, 2, None)],  # ranks, batch size, micro steps
        [(2, 2, 4), (1, 5, 2), (3, 1, None)],
        [(1, 1, 1), (4, 3, 1), (2, 1, None)],
    ],
)
def test_other_ranks_and_batch_sizes_resume_where_the_last_ended(tmp_path: Path, legs):
    """Cached: together they take the order from its start, no window left out and none twice."""
    documents = random_documents(3, 60)
    path, n = write_jsonl(tmp_path / "a.jsonl", documents), len(expected_windows(documents))
    order = ids_of(loader(options(path, batch_size=1, epochs=2)))
    assert [sorted(order[:n]), sorted(order[n:])] == [list(range(n))] * 2
    taken: list[int] = []
    position = None
    for world_size, batch_size, steps in legs:
        args = options(path, batch_size=batch_size, epochs=2)
        ranks = [list(loader(args, rank, world_size, position=position)) for rank in range(world_size)]
        assert len({len(rank) for rank in ranks}) == 1
        for batches in list(zip(*ranks, strict=True))[:steps]:
            taken += ids_of(batches)
            places = [place_behind(batch) for batch in batches]
            assert places == [places[0]] * world_size  # any rank's is all ranks'
            position = places[0]
    left_over = 2 * n - len(taken)
    assert taken == order[: len(taken)] and 0 <= left_over < world_size * batch_size


def test_resuming_with_other_text_is_an_error(tmp_path: Path):
    """A place in the data means nothing in other data, even of the same length."""
    args = options(write_jsonl(tmp_path / "text.jsonl", random_documents(0, 30)), dataset_streaming=False)
    place = place_behind(next(iter(loader(args))))
    assert len(place["tokens"]) == 64
    write_jsonl(tmp_path / "text.jsonl", random_documents(1, 30))
    with pytest.raises(ValueError, match="gives other tokens than when the checkpoint was written"):
        loader(args, position=place)
    write_jsonl(tmp_path / "text.jsonl", random_documents(0, 30))  # brought back: another time stamp, the same tokens
    assert next(iter(loader(args, position=place))).window_ids


# ---- drawing batches ahead


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path):
    batches = loader(options(write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))))
    before = torch.get_rng_state()
    list(batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_workers_give_the_same_batches(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))
    assert windows_of(loader(options(path, dataset_workers=1))) == windows_of(loader(options(path)))


def test_loader_workers_need_no_shared_memory(tmp_path: Path, monkeypatch, caplog):
    """A tensor would travel through it. Where there is none even for their queues, none are started."""
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))
    expected = windows_of(loader(options(path)))
    sent = data.collate([(3, torch.arange(4)), (1, torch.arange(4))])
    assert sent[0] == (3, 1) and isinstance(sent[1], np.ndarray)

    def semaphore(*args):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(multiprocessing.context.BaseContext, "Semaphore", semaphore)
    batches = loader(options(path, dataset_workers=2))
    assert batches.batches.num_workers == 0 and windows_of(batches) == expected
    assert "--dataset_workers 2: none are started, /dev/shm cannot be used (Read-only file system)" in caplog.text


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_is_removed_during_a_run_is_read_to_its_end(tmp_path: Path, workers: int):
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(0, 60))
    expected = windows_of(loader(options(path)))
    batches = iter(loader(options(path, dataset_workers=workers)))
    first = next(batches)
    shutil.rmtree(tmp_path / "hf")
    assert windows_of([first, *batches]) == expected


@pytest.mark.parametrize("workers", [0, 1])
def test_cached_batches_are_drawn_before_they_are_asked_for(tmp_path: Path, monkeypatch, workers: int):
    collated = Path(tmp_path / "collated")  # a file, as workers are processes
    collate = data.collate
    monkeypatch.setattr(data, "collate", lambda windows: append(collated, "one batch\n") or collate(windows))
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(0, 60))
    batches = iter(loader(options(path, dataset_workers=workers)))
    next(batches)
    wait_until(lambda: len(collated.read_text().splitlines()) > 8)
    batches.close()
    assert ahead_threads() == 0


def append(path: Path, text: str) -> None:
    with open(path, "a") as file:
        file.write(text)


# ---- the cache


def test_another_window_length_reuses_the_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    documents = random_documents(7, 40)
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    loader(options(path))
    (directory,) = packed_dirs(tmp_path)
    before = (directory / "tokens.bin").stat()
    encoded = record_encoded(monkeypatch)
    batches = loader(options(path, seq_length=5, batch_size=1))
    assert sorted(windows_of(batches)) == sorted(expected_windows(documents, 5))
    assert not encoded and packed_dirs(tmp_path) == [directory]
    assert (directory / "tokens.bin").stat().st_mtime_ns == before.st_mtime_ns


def test_edited_text_another_column_or_tokenizer_is_tokenised_anew(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.jsonl"
    row = {"text": "abcd" * 40, "other": "ijkl" * 40}
    path.write_text(json.dumps(row))
    encoded = record_encoded(monkeypatch)
    loader(options(path))
    loader(options(path, dataset_text_field="other"))
    another = pickle.loads(pickle.dumps(small_tokenizer()))
    another.add_tokens(["abcd"])
    build_dataloader(options(path), another, rank=0, world_size=1, is_builder=True)
    path.write_text(json.dumps(row | {"text": "efgh" * 40}))  # the same size
    windows = windows_of(loader(options(path, batch_size=1)))
    assert sorted(windows) == sorted(expected_windows(["efgh" * 40]))
    assert encoded == ["abcd" * 40, "ijkl" * 40, "abcd" * 40, "efgh" * 40]
    assert len(packed_dirs(tmp_path)) == 4


def test_edited_save_to_disk_folder_is_tokenised_anew(tmp_path: Path):
    for text in ("abcd" * 40, "efgh" * 40):
        shutil.rmtree(tmp_path / "saved", ignore_errors=True)
        datasets.Dataset.from_dict({"text": [text]}).save_to_disk(tmp_path / "saved")
        windows = windows_of(loader(options(tmp_path / "saved", batch_size=1)))
        assert sorted(windows) == sorted(expected_windows([text]))


def test_cache_directory_can_be_chosen(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))
    loader(options(path, dataset_cache_dir=str(tmp_path / "elsewhere")))
    assert len(list((tmp_path / "elsewhere" / "packed").glob("*"))) == 1 and not packed_dirs(tmp_path)


def build_and_hang(cache: Path, path: Path) -> None:
    """Builds a token file and hangs in the sixth batch of texts."""
    datasets.config.HF_DATASETS_CACHE = cache
    encode, batches = encoding.Encoder.__call__, iter(range(10**9))
    encoding.Encoder.__call__ = lambda *a: encode(*a) if next(batches) < 5 else time.sleep(600)
    encoding.text_batches.__defaults__ = (16, 1 << 22)
    loader(options(path))


def wait_for_the_build(cache: Path, path: Path) -> list:
    datasets.config.HF_DATASETS_CACHE = cache
    print("ready", flush=True)
    return windows_of(loader(options(path), rank=1, world_size=2))


def test_a_killed_build_is_not_served_and_a_waiting_rank_gets_the_next_one(tmp_path: Path):
    documents = random_documents(8, 300)
    work = tmp_path / "hf", write_jsonl(tmp_path / "a.jsonl", documents)
    with fresh.started(build_and_hang, *work) as builder, fresh.started(wait_for_the_build, *work) as waiter:
        wait_until(lambda: any(file.stat().st_size for file in tmp_path.glob("hf/packed/*/tokens.bin")))
        wait_until(lambda: waiter.written() == "ready\n")
        builder.process.kill()
        builder.process.join()
        assert builder.process.exitcode == -signal.SIGKILL
        time.sleep(1)
        assert waiter.process.is_alive()
        ranks = [windows_of(loader(options(work[1]), rank, 2)) for rank in range(2)]
        assert waiter.result(timeout=60) == ranks[1]
        assert len(ranks[0] + ranks[1]) == len(expected_windows(documents)) // 4 * 4
