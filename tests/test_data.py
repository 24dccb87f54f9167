"""data.py: every lane and every number of ranks sees the documents' own windows, once; bad input is named."""

import ctypes
import dataclasses
import gzip
import hashlib
import json
import logging
import pickle
import shutil
import signal
import socket
import time
from pathlib import Path

import datasets
import pytest
import torch
import torch.distributed as dist

import data
from arguments import TrainArguments
from data import build_dataloader
from tests import fresh
from tests.text.test_token_file import EOS, ahead_threads, plain_ids, random_documents, small_tokenizer
from text import encoding

ROOT = Path(__file__).parents[1]
SEQ = 8


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")


def options(name: Path | str, **changes) -> TrainArguments:
    """Cached, in order, everything else as by default."""
    args = TrainArguments(
        dataset_name=str(name),
        dataset_streaming=False,
        shuffle_buffer=0,
        seq_length=SEQ,
        batch_size=2,
        seed=0,
        # required, and nothing to do with data
        teacher_model="",
        student_model="",
        layers=[0],
        dtype="float32",
        output_dir="",
    )
    return dataclasses.replace(args, **changes)


def loader(args: TrainArguments, rank: int = 0, world_size: int = 1, **more):
    return build_dataloader(args, small_tokenizer(), rank=rank, world_size=world_size, is_builder=rank == 0, **more)


def write_jsonl(path: Path, rows: list, field: str = "text") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({field: row}) + "\n" for row in rows), encoding="utf-8")
    return path


def windows_of(batches) -> list[list[int]]:
    """The windows that batches were made of, in order."""
    rows = [torch.cat([batch.input_ids, batch.labels[:, -1:]], dim=1) for batch in batches]
    return [window for row in rows for window in row.tolist()]


def ids_of(batches) -> list[int]:
    return [i for batch in batches for i in batch.window_ids]


def expected_windows(documents: list[str], seq: int = SEQ) -> list[list[int]]:
    ids = plain_ids(documents)
    return [ids[i : i + seq + 1] for i in range(0, len(ids) - seq, seq + 1)]


def packed_dirs(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "hf" / "packed").glob("*"))


def count_encoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The texts that were tokenised from now on."""
    encoded: list[str] = []
    encode = encoding.Encoder.__call__
    monkeypatch.setattr(encoding.Encoder, "__call__", lambda self, texts: encoded.extend(texts) or encode(self, texts))
    return encoded


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
    """So that only the very last windows of the order can be left over, fewer than one micro step."""
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
    """In the cached lane by their numbers in the token file."""
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


# ---- going on


def place_behind(batch) -> dict:
    """As a checkpoint holds it."""
    return json.loads(json.dumps(batch.position.to_json()))


def told(batches) -> list[tuple]:
    """All that a run can see of batches."""
    return [(windows_of([batch]), list(batch.window_ids), place_behind(batch)) for batch in batches]


@pytest.mark.parametrize(
    "lane",
    [
        {"dataset_streaming": False},
        {"dataset_streaming": True, "shuffle_buffer": 0},
        {"dataset_streaming": True, "shuffle_buffer": 20},
    ],
    ids=["cached", "in order", "shuffled"],
)
@pytest.mark.parametrize("world_size", [1, 2])
def test_from_the_place_behind_any_batch_comes_exactly_the_rest(tmp_path: Path, monkeypatch, lane, world_size: int):
    """Over the border of two epochs, and from places that a run had which itself went on."""
    monkeypatch.setattr(encoding.text_batches, "__defaults__", (9, 1 << 22))  # several stacks in an epoch
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(5, 60))
    args = options(path, epochs=2, seq_length=150, **lane)
    for rank in range(world_size):
        whole = told(loader(args, rank, world_size))
        half = len(whole) // 2  # where, or one beside it, the second epoch begins
        for k in {0, 1, 4, 9, half - 2, half - 1, half, half + 1, half + 5, len(whole) - 2, len(whole) - 1}:
            rest = told(loader(args, rank, world_size, position=whole[k][2]))
            assert rest == whole[k + 1 :], k
        rest = told(loader(args, rank, world_size, position=whole[4][2]))
        assert told(loader(args, rank, world_size, position=rest[3][2])) == rest[4:]


def test_a_loader_that_goes_on_can_be_read_twice(tmp_path: Path):
    for lane in ({"dataset_streaming": False}, {"dataset_streaming": True, "shuffle_buffer": 20}):
        args = options(write_jsonl(tmp_path / "a.jsonl", random_documents(5, 60)), epochs=2, seq_length=60, **lane)
        whole = told(loader(args))
        batches = loader(args, position=whole[2][2])
        assert told(batches) == told(batches) == whole[3:]


def test_the_end_of_the_data_is_a_place_too(tmp_path: Path):
    for lane in ({"dataset_streaming": False}, {"dataset_streaming": True}):
        args = options(write_jsonl(tmp_path / "a.jsonl", random_documents(5, 30)), epochs=2, **lane)
        *_, last = loader(args)
        assert list(loader(args, position=place_behind(last))) == []


def sha256_of(packed: Path) -> str:
    return hashlib.sha256((packed / "tokens.bin").read_bytes()).hexdigest()


def test_a_place_is_small_and_plain(tmp_path: Path):
    """It goes into every checkpoint. In the cached lane it is a number and what it counts in; in a stream, texts of the
    buffer and the ids that fill no window yet.
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
def test_other_ranks_and_batch_sizes_go_on_where_the_last_ended(tmp_path: Path, legs):
    """In the cached lane: together they take the order from its start, no window left out and none twice."""
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


def test_streams_number_their_windows_from_the_start_of_an_epoch(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(encoding.text_batches, "__defaults__", (9, 1 << 22))
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(5, 60))
    args = options(path, dataset_streaming=True, epochs=2)
    for rank in range(2):
        epoch = ids_of(loader(dataclasses.replace(args, epochs=1), rank, 2))
        assert epoch == list(range(len(epoch))) and len(epoch) > 8
        assert ids_of(loader(args, rank, 2)) == epoch * 2


def test_loading_leaves_the_global_random_state_alone(tmp_path: Path):
    batches = loader(options(write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))))
    before = torch.get_rng_state()
    list(batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_loader_workers_give_the_same_batches(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))
    assert windows_of(loader(options(path, dataset_workers=1))) == windows_of(loader(options(path)))


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


# ---- streaming


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


def test_streaming_tokenises_the_next_texts_while_batches_of_the_last_are_used(tmp_path: Path, monkeypatch):
    documents = random_documents(1, 60)
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    monkeypatch.setattr(encoding.text_batches, "__defaults__", (20, 1 << 22))
    encoded = count_encoded(monkeypatch)
    batches = iter(loader(options(path, dataset_streaming=True)))
    next(batches)
    wait_until(lambda: len(encoded) > 20)
    batches.close()
    assert ahead_threads() == 0


def test_streaming_ranks_do_not_agree_at_every_step(tmp_path: Path, monkeypatch):
    """To agree is to wait for the slowest rank; they do it when one of them needs more text."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    agreements = []
    all_reduce = dist.all_reduce
    monkeypatch.setattr(dist, "all_reduce", lambda *args, **more: agreements.append(1) or all_reduce(*args, **more))
    monkeypatch.setattr(encoding.text_batches, "__defaults__", (20, 1 << 22))
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(1, 60))
    batches = list(loader(options(path, dataset_streaming=True), control_group=dist.group.WORLD))
    assert len(agreements) == 3 + 1 < len(batches)  # one for every 20 documents, one at the end


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


def test_streaming_error_in_the_thread_reaches_the_consumer_and_no_thread_stays(tmp_path: Path):
    path = write_jsonl(tmp_path / "a.jsonl", [*["a b c"] * 3000, 7])
    batches = loader(options(path, dataset_streaming=True))
    with pytest.raises(ValueError, match="row 3000 as read here holds int"):
        list(batches)
    next(iter(batches))
    assert ahead_threads() == 0


# ---- the cache


def test_another_window_length_reuses_the_token_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    documents = random_documents(7, 40)
    path = write_jsonl(tmp_path / "a.jsonl", documents)
    loader(options(path))
    (directory,) = packed_dirs(tmp_path)
    before = (directory / "tokens.bin").stat()
    encoded = count_encoded(monkeypatch)
    batches = loader(options(path, seq_length=5, batch_size=1))
    assert sorted(windows_of(batches)) == sorted(expected_windows(documents, 5))
    assert not encoded and packed_dirs(tmp_path) == [directory]
    assert (directory / "tokens.bin").stat().st_mtime_ns == before.st_mtime_ns


def test_edited_text_another_column_or_tokenizer_is_tokenised_anew(tmp_path: Path, monkeypatch):
    path = tmp_path / "a.jsonl"
    row = {"text": "abcd" * 40, "other": "ijkl" * 40}
    path.write_text(json.dumps(row))
    encoded = count_encoded(monkeypatch)
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


def wait_until(condition, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "took too long"
        time.sleep(0.05)


def build_and_hang(cache: Path, path: Path) -> None:
    """In the sixth batch of texts."""
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


def read_two_shares(folder: Path, path: Path, rank: int) -> list:
    """Numbers of batches of three passes, and whether a share that fills no batch is an error."""
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


HELD: list = []


def hold_a_stream(path: Path) -> None:
    HELD.append(iter(loader(options(path, dataset_streaming=True))))
    next(HELD[0])
    ctypes.pythonapi.Py_Exit(0)  # an interpreter's way to end, which a fork does not take by itself


def test_a_process_that_never_closes_a_stream_ends(tmp_path: Path):
    with fresh.started(hold_a_stream, write_jsonl(tmp_path / "a.jsonl", ["ab" * 50] * 40)) as holder:
        holder.process.join(timeout=60)
        assert holder.process.exitcode == 0, holder.written()


# ---- kinds of data


def as_jsonl(path: Path, documents: list[str]) -> Path:
    return write_jsonl(path / "a [1]*.jsonl", documents)  # a name that is also a pattern


def as_json(path: Path, documents: list[str]) -> Path:
    (path / "a.json").write_text(json.dumps([{"text": document} for document in documents]))
    return path / "a.json"


def as_gzip(path: Path, documents: list[str]) -> Path:
    with gzip.open(path / "a.jsonl.gz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in documents)
    return path / "a.jsonl.gz"


def as_parquet(path: Path, documents: list[str]) -> Path:
    datasets.Dataset.from_dict({"text": documents}).to_parquet(path / "a.parquet")
    return path / "a.parquet"


def as_txt(path: Path, documents: list[str]) -> Path:
    (path / "a.txt").write_text("\n\n".join(documents), encoding="utf-8")
    return path / "a.txt"


def as_directory(path: Path, documents: list[str]) -> Path:
    write_jsonl(path / "dir" / "1.jsonl", documents[:20])
    write_jsonl(path / "dir" / "2.jsonl", documents[20:])
    return path / "dir"


def as_saved(path: Path, documents: list[str]) -> Path:
    datasets.Dataset.from_dict({"text": documents}).save_to_disk(path / "saved")
    return path / "saved"


def as_saved_splits(path: Path, documents: list[str]) -> Path:
    splits = {"test": ["no"], "train": documents}
    datasets.DatasetDict({k: datasets.Dataset.from_dict({"text": v}) for k, v in splits.items()}).save_to_disk(
        path / "saved"
    )
    return path / "saved"


KINDS = [as_jsonl, as_json, as_gzip, as_parquet, as_txt, as_directory, as_saved, as_saved_splits]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("as_folder", [False, True])
def test_in_a_txt_file_blank_lines_separate_documents(tmp_path: Path, streaming: bool, as_folder: bool):
    documents = ["First Citizen:\nBefore we proceed, hear me.", "All:\nSpeak, speak.", "one line"] * 5
    file = as_txt(tmp_path, documents)
    name = tmp_path / "texts" if as_folder else file
    if as_folder:
        name.mkdir()
        file.rename(name / "a.txt")
    batches = loader(options(name, dataset_streaming=streaming, batch_size=1))
    assert sorted(windows_of(batches)) == sorted(expected_windows(documents))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_local_data_without_network(tmp_path: Path, monkeypatch, kind, streaming: bool):
    forbid_network(monkeypatch)
    documents = [document.replace("\n", " ") or "x" for document in random_documents(9, 40)]
    args = options(kind(tmp_path, documents), dataset_streaming=streaming, local_files_only=True, batch_size=1)
    assert sorted(windows_of(loader(args))) == sorted(expected_windows(documents))


def forbid_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_, **__):
        raise AssertionError("the network was touched")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def cache_as_hub_dataset(tmp_path: Path, documents: list[str]) -> None:
    """Leave in datasets' cache what a download of `someone/something` leaves there."""
    source = write_jsonl(tmp_path / "src" / "a.jsonl", documents)
    builder = datasets.load_dataset_builder("json", data_files=str(source))
    builder.download_and_prepare()
    folder = tmp_path / "hf" / "someone___something" / "default" / "0.0.0" / ("c0ffee" * 7)[:40]
    shutil.copytree(builder.cache_dir, folder)
    for path in folder.glob("json-*"):
        path.rename(path.with_name(path.name.replace("json-", "something-")))
    info = json.loads((folder / "dataset_info.json").read_text())
    info |= {"dataset_name": "something", "config_name": "default"}
    info["splits"]["train"]["dataset_name"] = "something"
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.mark.parametrize("streaming", [False, True])
def test_hub_dataset_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streaming: bool):
    forbid_network(monkeypatch)
    args = options("someone/something", dataset_streaming=streaming, local_files_only=True, batch_size=1)
    with pytest.raises(ValueError, match="'someone/something'.*not in the cache .*--local_files_only"):
        loader(args)
    documents = random_documents(10, 30)
    cache_as_hub_dataset(tmp_path, documents)
    assert sorted(windows_of(loader(args))) == sorted(expected_windows(documents))
    with pytest.raises(ValueError, match="--dataset_split 'test': no such split; available: train"):
        loader(dataclasses.replace(args, dataset_split="test"))
    assert not datasets.config.HF_HUB_OFFLINE  # as it was found


def test_files_of_another_kind_in_a_directory_are_mentioned(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    directory = as_directory(tmp_path, random_documents(12, 40))
    loader(options(directory))
    assert not caplog.records
    as_txt(directory, ["notes"])
    loader(options(directory))
    assert "1 file(s) of" in caplog.text and "a.txt" in caplog.text


def test_split_expressions(tmp_path: Path):
    write_jsonl(tmp_path / "dir" / "train.jsonl", ["abcd" * 40] * 10)
    write_jsonl(tmp_path / "dir" / "test.jsonl", ["efgh" * 40])
    args = options(tmp_path / "dir", dataset_split="train[:10%]+test", batch_size=1)
    expected = expected_windows(["abcd" * 40, "efgh" * 40])
    assert sorted(windows_of(loader(args))) == sorted(expected)
    with pytest.raises(ValueError, match="--dataset_split 'train\\[:10%\\]\\+test': .*"):
        loader(dataclasses.replace(args, dataset_streaming=True))


def test_rows_without_text_are_skipped_in_both_lanes(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    documents = random_documents(11, 30)
    path = write_jsonl(tmp_path / "a.jsonl", ["", *documents[:9], None, *documents[9:]])
    for streaming in (False, True):
        args = options(path, dataset_streaming=streaming, batch_size=1)
        with caplog.at_level(logging.INFO, "train"):
            assert sorted(windows_of(loader(args))) == sorted(expected_windows(documents))
    skipped = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    assert skipped == ["skipped 2 of 32 rows: no text in column 'text'"] * 2


# ---- what is wrong is named


BOTH_LANES = pytest.mark.parametrize("streaming", [False, True])


@BOTH_LANES
@pytest.mark.parametrize(
    ("rows", "changes", "message"),
    [
        (
            ["a" * 99],
            {"dataset_text_field": "body"},
            "--dataset_text_field 'body': no such column; available: text",
        ),
        ([1, 2], {}, "--dataset_text_field 'text': the column holds .*int64.*, expected text"),
        ([["a"]], {}, "--dataset_text_field 'text': the column holds List.*, expected text"),
        (["a" * 99, 5, "b"], {}, "--dataset_text_field 'text': row 1 as read here holds int .5., expected text"),
        (["a" * 99], {"dataset_split": "test"}, "--dataset_split 'test': no such split; available: train"),
        (["a" * 99], {"dataset_subset": "en"}, "--dataset_subset 'en': .*; leave it out"),
        (["a" * 99], {"dataset_revision": "v1"}, "--dataset_revision 'v1': .*; leave it out"),
    ],
)
def test_wrong_columns_rows_splits(tmp_path: Path, streaming: bool, rows: list, changes: dict, message: str):
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        list(loader(options(path, dataset_streaming=streaming, **changes)))


@BOTH_LANES
@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.jsonl", None, "none.jsonl': no such file or directory"),
        ("none/such/dir", None, "none/such/dir': no such file or directory"),
        ("a.docx", b"x", "a.docx': unsupported file ending, expected one of .jsonl, .json, .parquet, .txt"),
        ("a.parquet.gz", b"x", "unsupported file ending"),
        ("a.jsonl", b'{"text": "a"}\n{"text": \n', "JSON parse error"),
        ("a.txt", b"", "--dataset_name|too small"),
    ],
)
def test_wrong_files(tmp_path: Path, streaming: bool, name: str, content: bytes | None, message: str):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        loader(options(tmp_path / name, dataset_streaming=streaming))


@BOTH_LANES
def test_an_empty_file(tmp_path: Path, streaming: bool):
    (tmp_path / "a.jsonl").touch()
    with pytest.raises(ValueError, match="--dataset_name .*split 'train' has no rows"):
        loader(options(tmp_path / "a.jsonl", dataset_streaming=streaming))


@BOTH_LANES
def test_wrong_directories(tmp_path: Path, streaming: bool):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="--dataset_name .*empty.* cannot be opened"):
        loader(options(tmp_path / "empty", dataset_streaming=streaming))
    as_saved_splits(tmp_path, ["a"])
    with pytest.raises(ValueError, match="--dataset_split 'dev': no such split; available: test, train"):
        loader(options(tmp_path / "saved", dataset_split="dev", dataset_streaming=streaming))
    write_jsonl(tmp_path / "dir" / "a.jsonl", ["a"])
    with pytest.raises(ValueError, match="subset 'en'.* cannot be opened.*default"):
        loader(options(tmp_path / "dir", dataset_subset="en", dataset_streaming=streaming))


@pytest.mark.timeout(60)
def test_a_rank_that_would_wait_for_the_file_sees_a_wrong_column_itself(tmp_path: Path):
    with pytest.raises(ValueError, match="--dataset_text_field 'body'"):
        loader(options(as_saved(tmp_path, ["a"]), dataset_text_field="body"), rank=1, world_size=2)


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


def test_going_on_with_other_text_is_an_error(tmp_path: Path):
    """The place in the data means nothing in other data, even where it is of the same length."""
    args = options(write_jsonl(tmp_path / "text.jsonl", random_documents(0, 30)), dataset_streaming=False)
    place = place_behind(next(iter(loader(args))))
    assert len(place["tokens"]) == 64
    write_jsonl(tmp_path / "text.jsonl", random_documents(1, 30))
    with pytest.raises(ValueError, match="gives other tokens than when the checkpoint was written"):
        loader(args, position=place)
    write_jsonl(tmp_path / "text.jsonl", random_documents(0, 30))  # brought back: another time stamp, the same tokens
    assert next(iter(loader(args, position=place))).window_ids
