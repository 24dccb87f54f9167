"""text/cache.py: with --dataset_cache_dir all that is cached is there, and nothing needs a home directory."""

import errno
import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from tests.launch import ROOT
from tests.small_runs import make_models
from tests.small_runs import options as run_options
from tests.text.documents import (
    as_directory,
    as_gzip,
    as_parquet,
    as_txt,
    cache_as_hub_dataset,
    expected_windows,
    loader,
    options,
    random_documents,
    windows_of,
    write_jsonl,
)
from text.opening import NotCached, open_source, open_table
from text.sources import TextSource, network_forbidden

KINDS = {"jsonl": lambda path, rows: write_jsonl(path / "a.jsonl", rows), "gzip": as_gzip, "parquet": as_parquet}
KINDS |= {"txt": as_txt, "directory": as_directory}


@pytest.fixture
def no_home(tmp_path, monkeypatch):
    """Makes the cache of `datasets`, and that of the hub, folders that nobody can make."""
    (tmp_path / "file").write_text("")
    home = tmp_path / "file" / "home"
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", home)
    monkeypatch.setattr("datasets.config.DOWNLOADED_DATASETS_PATH", str(home / "downloads"))
    monkeypatch.setattr("datasets.config.EXTRACTED_DATASETS_PATH", str(home / "extracted"))
    return home


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_all_that_is_cached_is_in_the_folder(tmp_path: Path, no_home, kind: str, streaming: bool):
    documents = [document for document in random_documents(0, 40) if document.strip() and "\n" not in document]
    path = KINDS[kind](tmp_path, documents)
    cache = tmp_path / "cache"
    args = options(path, dataset_cache_dir=str(cache), dataset_streaming=streaming, batch_size=1)
    assert sorted(windows_of(loader(args))) == sorted(expected_windows(documents))
    tables = [file.relative_to(cache).parts[0] for file in cache.rglob("*.arrow")]
    assert bool(tables) == (not streaming) and len(list(cache.glob("packed/*"))) == (not streaming)


def test_a_stream_needs_no_cache(tmp_path: Path, no_home):
    documents = random_documents(0, 30)
    args = options(write_jsonl(tmp_path / "a.jsonl", documents), dataset_streaming=True, batch_size=1)
    assert sorted(windows_of(loader(args))) == sorted(expected_windows(documents))


def test_a_home_that_cannot_be_written_is_one_line_that_names_the_option(tmp_path: Path, no_home):
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))
    with pytest.raises(ValueError, match="the cache of `datasets`, .*home: cannot be written .*--dataset_cache_dir"):
        loader(options(path))


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(
    "where,problem", [("file", "is a file, expected a folder"), ("file/below", "cannot be written")]
)
def test_a_folder_that_cannot_be_used_is_one_line(tmp_path: Path, where: str, problem: str, streaming: bool):
    (tmp_path / "file").write_text("kept")
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))
    args = options(path, dataset_cache_dir=str(tmp_path / where), dataset_streaming=streaming)
    with pytest.raises(ValueError, match=f"--dataset_cache_dir {tmp_path / where}: {problem}.*; name a folder"):
        loader(args)
    assert (tmp_path / "file").read_text() == "kept"


def test_packed_tokens_on_a_disk_that_cannot_be_written_are_used(tmp_path: Path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30))
    args = options(path, dataset_cache_dir=str(tmp_path / "cache"))
    windows = windows_of(loader(args))
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr("text.cache._writing_problem", lambda folder: "cannot be written (Read-only file system)")
    assert windows_of(loader(args)) == windows
    assert sorted(tmp_path.rglob("*")) == before
    other = write_jsonl(tmp_path / "b.jsonl", random_documents(1, 30))
    with pytest.raises(ValueError, match="--dataset_cache_dir .*cannot be written .Read-only file system.; name a"):
        loader(options(other, dataset_cache_dir=str(tmp_path / "cache")))


@pytest.mark.parametrize("kind", ["jsonl", "directory", "csv", "hub"])
def test_tables_on_a_disk_that_cannot_be_written_are_used(tmp_path: Path, monkeypatch, kind: str):
    rows = [f"row {i}" for i in range(40)]
    if kind == "hub":
        cache_as_hub_dataset(tmp_path, {"train": rows})
        cache, name = tmp_path / "hf", "someone/something"
    else:
        cache, name = tmp_path / "cache", str(tmp_path / "a.csv")
        Path(name).write_text("\n".join(["text", *rows]))
        name = name if kind == "csv" else str(KINDS[kind](tmp_path, rows))
    source = TextSource(name, split="train[:75%]", cache_dir=str(cache), local_files_only=True)
    with network_forbidden(True):
        if kind != "hub":
            open_table(open_source(source), source)
        before = sorted(tmp_path.rglob("*"))
        monkeypatch.setattr("text.cache._writing_problem", lambda folder: "cannot be written (Read-only file system)")
        assert open_table(open_source(source), source)["text"][:] == rows[:30]
    assert sorted(tmp_path.rglob("*")) == before


def full(*args, **kwargs):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def full_in_datasets(*args, **kwargs):
    try:
        full()
    except OSError as error:
        raise datasets.exceptions.DatasetGenerationError("An error occurred while generating the dataset") from error


@pytest.mark.parametrize(
    "writes,fails",
    [
        ("datasets.DatasetBuilder.download_and_prepare", full_in_datasets),
        ("text.token_file.flush_to_disk", full),
        ("text.token_file.os.replace", full),
    ],
)
def test_a_disk_that_is_full_is_one_line(tmp_path: Path, monkeypatch, writes: str, fails):
    args = options(write_jsonl(tmp_path / "a.jsonl", random_documents(0, 30)), dataset_cache_dir=str(tmp_path / "c"))
    with monkeypatch.context() as patched:
        patched.setattr(writes, fails)
        with pytest.raises(
            ValueError, match=r"--dataset_cache_dir .*/c: cannot be written \(No space left on device\)"
        ):
            loader(args)
    assert not list((tmp_path / "c").glob("packed/*"))
    assert windows_of(loader(args))


def test_of_the_hub_offline_what_all_programs_share_is_found_too(tmp_path: Path, monkeypatch):
    """The folder comes first, and what is not there may have been prepared by `load_dataset` elsewhere."""
    asked = []

    def load(reader, **settings):
        asked.append((Path(settings["cache_dir"]).name, constants.HF_HUB_CACHE))
        raise FileNotFoundError("no such data")

    monkeypatch.setattr(datasets, "load_dataset_builder", load)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", "shared")
    source = TextSource("someone/something", cache_dir=str(tmp_path / "cache"), local_files_only=True)
    with pytest.raises(NotCached, match=f"not in the cache {tmp_path / 'cache'} "):
        open_source(source)
    assert asked == [("cache", str(tmp_path / "cache" / "hub")), ("hf", str(tmp_path / "cache" / "hub"))]
    with pytest.raises(NotCached):
        open_source(TextSource("someone/something", local_files_only=True))
    assert asked[2:] == [("hf", "shared")] and constants.HF_HUB_CACHE == "shared"


def test_of_the_hub_out_of_reach_what_all_programs_share_is_found(tmp_path: Path, monkeypatch, caplog):
    """Also where the environment, and no option, forbids the network. Its revision is not checked then."""
    cache_as_hub_dataset(tmp_path, {"train": ["a", "b"]})
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    source = TextSource("someone/something", revision="v2", cache_dir=str(tmp_path / "cache"))
    assert open_table(open_source(source), source)["text"][:] == ["a", "b"]
    assert "--dataset_revision v2 not checked" in caplog.text


def test_a_run_and_the_doctor_need_no_home(tmp_path: Path):
    """As real processes: libraries look for a home directory when they are imported, too."""
    models = make_models(tmp_path / "models")
    with gzip.open(tmp_path / "held-out.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": document}) + "\n" for document in random_documents(0, 30))
    (tmp_path / "file").write_text("")
    argv = run_options(
        models,
        tmp_path / "out",
        no_wandb=True,
        max_steps=2,
        eval_interval=1,
        eval_windows=2,
        eval_dataset_name=tmp_path / "held-out.jsonl.gz",
        eval_dataset_split="train[50%:]",  # needs a table
    )
    program = "import sys, train_gpus, doctor; sys.exit(train_gpus.main()) if doctor.main() < 2 else 3"
    without = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "XDG_"))}
    environment = {**without, "HOME": str(tmp_path / "file" / "home"), "OMP_NUM_THREADS": "1"}
    ended = subprocess.run([sys.executable, "-c", program, *argv], cwd=ROOT, env=environment, capture_output=True)
    log = ended.stdout.decode() + ended.stderr.decode()
    assert ended.returncode == 0 and "complete: 2 of 2" in log, log[-3000:]
    assert "failure  data" not in log and "failure  cache" not in log and "failure  held-out" not in log
    assert "Errno 20" not in log and "Not a directory" not in log
