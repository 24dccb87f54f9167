"""text/stream.py: a share resumes at any place exactly, also when the connection breaks."""

import contextlib
import json
from collections.abc import Callable
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests import fresh
from text.encoding import text_batches
from text.faults import Faults
from text.retries import WAITS_S
from text.sources import TextSource
from text.stream import StreamState, TextStream
from text.tolerant_reader import tolerant_stream

N_FILES, N_ROWS = 4, 900
ROWS = [f"row {i:04d} of naïve 日本 text" if i % 50 else (None if i % 100 else "") for i in range(N_ROWS)]
TEXTS = [row for row in ROWS if row]


@pytest.fixture(autouse=True)
def small_batches(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_batches, "__defaults__", (60, 1 << 22))


def parts() -> list[list[str | None]]:
    """Returns the rows of files of unequal length, one of them shorter than what is read at once."""
    cuts = [0, 100, 437, 700, N_ROWS]
    return [ROWS[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]


def from_jsonl(folder: Path) -> datasets.IterableDataset:
    for i, rows in enumerate(parts()):
        lines = [json.dumps({"text": row, "n": 1}) + "\n" for row in rows]
        (folder / f"{i}.jsonl").write_text("".join(lines), encoding="utf-8")
    builder = datasets.load_dataset_builder("json", data_files=[str(folder / f"{i}.jsonl") for i in range(N_FILES)])
    return builder.as_streaming_dataset(split="train").select_columns(["text"])


def from_parquet(folder: Path) -> datasets.IterableDataset:
    files = [str(folder / f"{i}.parquet") for i in range(N_FILES)]
    for file, rows in zip(files, parts(), strict=True):
        pq.write_table(pa.table({"text": rows, "n": [1] * len(rows)}), file, row_group_size=97)
    builder = datasets.load_dataset_builder("parquet", data_files=files)
    return builder.as_streaming_dataset(split="train").select_columns(["text"])


def from_saved(folder: Path) -> datasets.IterableDataset:
    datasets.Dataset.from_dict({"text": ROWS}).save_to_disk(folder / "saved", num_shards=3)
    return datasets.load_from_disk(str(folder / "saved")).to_iterable_dataset().select_columns(["text"])


KINDS = [from_jsonl, from_parquet, from_saved]


def stream_of(data: datasets.IterableDataset, rank: int = 0, world_size: int = 1, **changes) -> TextStream:
    settings = {"shuffle_buffer": 100, "seed": 5, **changes}
    source = TextSource("rows", skip_bad_rows=settings.pop("skip_bad_rows", False))
    return TextStream(data, source, rank=rank, world_size=world_size, **settings)


def stored(state: StreamState) -> dict:
    return json.loads(json.dumps(state.to_json()))


# Each kind with each number of ranks (of 4 files: whole files, half of them, every third row) and with each buffer,
# and each number of ranks with each buffer.
@pytest.mark.parametrize(
    "make,world_size,shuffle_buffer",
    [(KINDS[i], 1 + j, (0, 100, 5000)[(i + j) % 3]) for i in range(3) for j in range(3)],
)
def test_a_pass_resumes_exactly_before_every_batch(
    tmp_path: Path, make: Callable, world_size: int, shuffle_buffer: int
):
    data = make(tmp_path)
    seen: list[str] = []
    for rank in range(world_size):
        straight = list(stream_of(data, rank, world_size, shuffle_buffer=shuffle_buffer).batches(3))
        seen += sum((texts for _, texts in straight), [])
        expected = [texts for _, texts in straight]
        states = [stored(state) for state, _ in straight]  # long after the batches
        assert len(straight) > 4
        for k, state in enumerate(states):
            again = list(stream_of(make(tmp_path), rank, world_size, shuffle_buffer=shuffle_buffer).batches(3, state))
            assert [texts for _, texts in again] == expected[k:]
            twice = stored(again[len(again) // 2][0])  # a place in a pass that itself began at one
            third = stream_of(data, rank, world_size, shuffle_buffer=shuffle_buffer).batches(3, twice)
            assert [texts for _, texts in third] == expected[k + len(again) // 2 :]
    assert sorted(seen) == sorted(TEXTS)
    if shuffle_buffer == 0 and world_size == 1:
        assert seen == TEXTS


def rest(folder: Path, state: dict) -> list[list[str]]:
    text_batches.__defaults__ = (60, 1 << 22)
    return [texts for _, texts in stream_of(from_jsonl(folder)).batches(0, state)]


def test_another_process_resumes(tmp_path: Path):
    straight = list(stream_of(from_jsonl(tmp_path)).batches(0))
    assert fresh.call(rest, tmp_path, stored(straight[4][0])) == [texts for _, texts in straight[4:]]


def test_the_order_follows_seed_epoch_and_rank_and_repeats(tmp_path: Path):
    data = from_jsonl(tmp_path)

    def order(seed: int, epoch: int, rank: int = 0, world_size: int = 1) -> list[str]:
        return sum((texts for _, texts in stream_of(data, rank, world_size, seed=seed).batches(epoch)), [])

    assert order(0, 1) == order(0, 1)
    orders = [order(0, 0), order(0, 1), order(1, 0)]
    assert len({tuple(one) for one in orders}) == 3
    assert all(sorted(one) == sorted(TEXTS) for one in orders)
    # ranks that read the same rows would not draw the same places of their buffers
    buffers = [next(iter(stream_of(data, rank, 2).batches(0)))[0].generator for rank in (0, 1)]
    assert buffers[0] != buffers[1]


def test_files_are_read_in_an_order_of_their_own_in_every_epoch_only_if_rows_are_shuffled(tmp_path: Path):
    data = from_jsonl(tmp_path)
    firsts = {next(iter(stream_of(data, shuffle_buffer=1).batches(epoch)))[1][0] for epoch in range(12)}
    assert len({text[:6] for text in firsts}) > 2  # near the start of several files
    kept = [sum((texts for _, texts in stream_of(data, shuffle_buffer=0).batches(epoch)), []) for epoch in (0, 7)]
    assert kept == [TEXTS, TEXTS]


def test_a_place_is_cheap_and_copies_no_text(tmp_path: Path):
    batches = list(stream_of(from_jsonl(tmp_path)).batches(0))
    (before, _), (after, _) = batches[3:5]
    held = {id(text) for text in before.buffer}
    assert len(before.buffer) == 100 and sum(id(text) in held for text in after.buffer) > 30


def test_what_was_skipped_before_the_place_is_counted_too(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    *_, (last, _) = stream_of(from_jsonl(tmp_path)).batches(0)
    for state in (None, stored(last)):
        caplog.clear()
        list(stream_of(from_jsonl(tmp_path)).batches(0, state))
        assert [record.getMessage() for record in caplog.records] == [
            "skipped 18 of 900 rows: no text in column 'text'"
        ]


@pytest.mark.parametrize("changes", [{"seed": 6}, {"shuffle_buffer": 99}, {"rank": 1}, {"world_size": 3}])
def test_a_place_of_another_order_is_refused(tmp_path: Path, changes: dict):
    data = from_jsonl(tmp_path)
    state = next(stream_of(data, 0, 2).batches(0))[0].to_json()
    ((name, value),) = changes.items()
    with pytest.raises(ValueError, match=rf"made with {name} .* \(now {value}\): expected the same.*give the same"):
        next(stream_of(data, **{"rank": 0, "world_size": 2, **changes}).batches(0, state))
    with pytest.raises(ValueError, match=r"made with epoch 0 \(now 1\)"):
        next(stream_of(data, 0, 2).batches(1, state))


@pytest.mark.parametrize("world_size", [1, 2, 5])  # of 5 files: all, every second row, a file each
@pytest.mark.parametrize("shuffle_buffer", [0, 100])
def test_a_run_that_a_bad_row_ended_resumes_without_it(tmp_path: Path, world_size: int, shuffle_buffer: int):
    from_jsonl(tmp_path)
    files = [str(tmp_path / f"{i}.jsonl") for i in range(N_FILES)]
    files.append(str(tmp_path / "bad.jsonl"))
    Path(files[-1]).write_text('{"text": "a last good row"}\n{"text": "cut o\n')
    reader = datasets.load_dataset_builder("json", data_files=files).as_streaming_dataset(split="train")
    all_states = []
    for rank in range(world_size):
        ended = stream_of(reader.select_columns(["text"]), rank, world_size, shuffle_buffer=shuffle_buffer)
        states: list[dict] = []
        with contextlib.suppress(pa.ArrowInvalid):
            states += (stored(state) for state, _ in ended.batches(0))
        skipping = stream_of(
            tolerant_stream(files, "text"), rank, world_size, shuffle_buffer=shuffle_buffer, skip_bad_rows=True
        )
        expected = [texts for _, texts in skipping.batches(0)]
        all_states += states
        for k, state in enumerate(states):
            again = list(skipping.batches(0, state))
            assert [texts for _, texts in again] == expected[k:]
            twice = skipping.batches(0, stored(again[len(again) // 2][0]))
            assert [texts for _, texts in twice] == expected[k + len(again) // 2 :]
    assert len(all_states) > 3
    with pytest.raises(ValueError, match=r"made with skip_bad_rows True \(now False\)"):
        next(ended.batches(0, stored(next(skipping.batches(0))[0])))


# ---- the connection


class Unsteady:
    """Gives a stream whose connection breaks before some rows, as often as `breaks` says."""

    def __init__(self, breaks: dict[int, int], error: Exception):
        self.left, self.error, self.n_opened = dict(breaks), error, 0

    def stream(self) -> datasets.IterableDataset:
        return datasets.IterableDataset.from_generator(self.rows, gen_kwargs={"part": [0, 1]})

    def rows(self, part: list[int]):
        self.n_opened += 1
        for i in range(part[0], N_ROWS, 2):
            if self.left.get(i, 0) > 0:
                self.left[i] -= 1
                raise self.error
            yield {"text": ROWS[i]}

    def __reduce__(self):  # `datasets` takes a fingerprint of the generator, and must not copy it
        return Unsteady, ({}, self.error)


@pytest.mark.parametrize("shuffle_buffer", [0, 30])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_no_row_is_lost_or_repeated_when_the_connection_breaks(caplog, shuffle_buffer: int, world_size: int):
    seen: list[str] = []
    for rank in range(world_size):
        waits: list[float] = []
        steady, unsteady = (
            stream_of(
                Unsteady(breaks, ConnectionResetError("reset by peer")).stream(),
                rank,
                world_size,
                shuffle_buffer=shuffle_buffer,
                sleep=waits.append,
            )
            for breaks in ({}, {0: 2, 1: 1, 300: 1, 301: 1, 640: 4, 899: 1})
        )
        expected = [texts for _, texts in steady.batches(2)]
        assert not waits
        assert [texts for _, texts in unsteady.batches(2)] == expected
        assert waits[:2] == [1, 2]
        seen += sum(expected, [])
    assert sorted(seen) == sorted(TEXTS)
    assert "reading the data failed (ConnectionResetError: reset by peer): try 1 of 10 in 1 s" in caplog.text


def test_a_place_from_after_a_break_is_as_good(tmp_path: Path):
    data = Unsteady({500: 2, 501: 2}, TimeoutError("timed out")).stream()
    straight = list(stream_of(data, sleep=lambda _: None).batches(0))
    for k, (state, _) in enumerate(straight):
        again = stream_of(Unsteady({}, TimeoutError()).stream()).batches(0, stored(state))
        assert [texts for _, texts in again] == [texts for _, texts in straight[k:]]


def test_tries_without_progress_end(caplog: pytest.LogCaptureFixture):
    waits: list[float] = []
    data = Unsteady({601: 99, 1: 10}, ConnectionError("no route")).stream()
    seen: list[str] = []
    with pytest.raises(ConnectionError, match="10 tries .* brought no further row .*no route.*; check the connection"):
        for _, texts in stream_of(data, shuffle_buffer=0, sleep=waits.append).batches(0):
            seen += texts
    assert waits == [*WAITS_S, *WAITS_S]  # as often again once rows had come
    assert 200 < len(seen) < len(TEXTS)


class InFile3(Faults):
    def __init__(self):
        super().__init__(datasets.Dataset.from_dict({}), TextSource("x"))

    def __call__(self, error: Exception) -> ValueError:
        return ValueError(f"file 3: {error}")


def test_errors_of_the_data_are_raised_at_once_and_explained():
    data = Unsteady({10: 1}, ValueError("bad row")).stream()
    with pytest.raises(ValueError, match="^bad row$"):
        list(stream_of(data, sleep=pytest.fail).batches(0))
    data = Unsteady({10: 1}, ValueError("bad row")).stream()
    with pytest.raises(ValueError, match="^file 3: bad row$"):
        list(stream_of(data, sleep=pytest.fail, explain=InFile3()).batches(0))
