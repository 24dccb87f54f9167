"""Damages files at random. A damaged checkpoint must never pass as whole; a damaged text must be read or refused with
the file's name, and must never raise an unforeseen error.
"""

import gzip
import json
import logging
import random
import shutil
from collections import Counter
from pathlib import Path

import datasets

from checkpointing.files import hash_check, quick_check, read_sums
from tests.launch import Launch
from tests.small_runs import TEXT, make_models, options
from text.faults import explain_fault
from text.opening import open_source, open_stream, open_table
from text.rows import only_texts, rows_of
from text.sources import TextSource


def flip_a_bit(file: Path, dice: random.Random) -> None:
    content = bytearray(file.read_bytes())
    content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
    file.write_bytes(content)


def cut_short(file: Path, dice: random.Random) -> None:
    content = file.read_bytes()
    file.write_bytes(content[: dice.randrange(len(content))])


def overwrite_a_block(file: Path, dice: random.Random) -> None:
    """Writes zeros over some bytes, as a disk that loses power does."""
    content = bytearray(file.read_bytes())
    start = dice.randrange(len(content))
    content[start : start + 512] = bytes(len(content[start : start + 512]))
    if bytes(content) == file.read_bytes():  # they were zeros
        content[start] ^= 1
    file.write_bytes(content)


def delete(file: Path, dice: random.Random) -> None:
    file.unlink()


def append(file: Path, dice: random.Random) -> None:
    file.write_bytes(file.read_bytes() + dice.randbytes(dice.randint(1, 100)))


DAMAGE = (flip_a_bit, cut_short, overwrite_a_block, delete, append)


def make_checkpoint(folder: Path) -> Path:
    """Returns the checkpoint of two ranks after three steps."""
    launch = Launch(options(make_models(folder), folder / "run", max_steps=3), 2, folder / "run.log")
    assert launch.wait() == [0, 0], launch.text()
    return folder / "run" / "checkpoint-3"


def damage_checkpoints(whole: Path, folder: Path, n: int, dice: random.Random) -> dict:
    """Damages a checkpoint's files one at a time, in copies; `missed` lists the copies that passed as whole."""
    assert quick_check(whole) is None and hash_check(whole, read_sums(whole)) is None
    files = sorted(path.name for path in whole.iterdir())
    caught, missed = Counter(), []
    for _ in range(n):
        bad = folder / "checkpoint-1"
        shutil.copytree(whole, bad)
        name, kind = dice.choice(files), dice.choice(DAMAGE)
        kind(bad / name, dice)
        problem = quick_check(bad) or hash_check(bad, read_sums(bad))
        if problem is None:
            missed.append(f"{kind.__name__} {name}")
        else:
            caught[kind.__name__] += 1
        shutil.rmtree(bad)
    return {"tried": n, "caught": dict(caught), "missed": missed}


def damage_texts(folder: Path, n: int, dice: random.Random) -> dict:
    """Damages text files and reads each cached and streamed, with --skip_bad_rows and without."""
    datasets.disable_progress_bars()
    logging.getLogger("datasets").setLevel(logging.CRITICAL)
    logging.getLogger("train").setLevel(logging.ERROR)
    rows = [json.loads(line) for line in TEXT.read_text().splitlines()[:40]]
    table = datasets.Dataset.from_list(rows)
    whole = folder / "whole"
    whole.mkdir()
    table.to_json(whole / "rows.jsonl")
    table.to_parquet(whole / "rows.parquet")
    (whole / "rows.jsonl.gz").write_bytes(gzip.compress((whole / "rows.jsonl").read_bytes()))
    kinds = [kind for kind in DAMAGE if kind is not delete]
    outcomes, unforeseen = Counter(), []
    for number in range(n):
        source = dice.choice(sorted(whole.iterdir()))
        bad = folder / f"{number}-{source.name}"
        shutil.copy(source, bad)
        kind = dice.choice(kinds)
        kind(bad, dice)
        for streaming in (False, True):
            for skip in (False, True):
                outcome = read_all(bad, folder / "cache", streaming, skip)
                outcomes[outcome if not outcome.startswith("!") else "unforeseen"] += 1
                if outcome.startswith("!"):
                    unforeseen.append(f"{kind.__name__} {source.name} streaming={streaming} skip={skip}: {outcome}")
        bad.unlink()
    return {"tried": 4 * n, "outcomes": dict(outcomes), "unforeseen": unforeseen}


def read_all(file: Path, cache: Path, streaming: bool, skip: bool) -> str:
    source = TextSource(str(file), cache_dir=str(cache), local_files_only=True, skip_bad_rows=skip)
    try:
        opened = open_source(source)
        data = open_stream(opened, source) if streaming else open_table(opened, source)

        def explain(error: Exception) -> Exception:
            return explain_fault(error, opened, source)

        texts = list(only_texts(rows_of(data, source.text_field, explain), source))
    except ValueError as error:
        return "refused, with the file's name" if file.name in str(error) else f"! {error}"
    except Exception as error:  # what this looks for
        return f"! {type(error).__name__}: {error}"
    return "all rows read" if len(texts) >= 40 else "read without the bad rows"
