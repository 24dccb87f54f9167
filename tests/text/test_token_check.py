"""text/token_check.py: a token file that is not what was written is found out, and so is what describes it."""

import errno
import hashlib
import json
import os
import shutil
from pathlib import Path

import psutil
import pytest

from tests.text.documents import random_documents, small_tokenizer
from text import token_check
from text.encoding import Encoder
from text.token_check import DamagedTokens, verified_hash
from text.token_file import read_about, write_token_file


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    write_token_file(tmp_path / "packed", random_documents(0, 40), Encoder(small_tokenizer()), {"made": "here"})
    return tmp_path / "packed"


def sha256_of(packed: Path) -> str:
    return hashlib.sha256((packed / "tokens.bin").read_bytes()).hexdigest()


def hash_of(packed: Path, expected: str | None = None) -> str | None:
    return verified_hash(packed, read_about(packed), expected).result(timeout=30)


def change_about(packed: Path, **changes) -> None:
    """Changes about.json; None removes a field."""
    about = json.loads((packed / "about.json").read_text()) | changes
    (packed / "about.json").write_text(json.dumps({name: value for name, value in about.items() if value is not None}))


def zero(packed: Path) -> None:
    """Overwrites all tokens with zeros, of the same length."""
    (packed / "tokens.bin").write_bytes(bytes((packed / "tokens.bin").stat().st_size))


@pytest.fixture(params=["at once", "in the background"])
def either_way(request, monkeypatch):
    monkeypatch.setattr(token_check, "AT_ONCE", 2**28 if request.param == "at once" else 0)
    monkeypatch.setattr(token_check, "BLOCK", 100)


def test_the_hash_is_that_of_the_tokens(packed: Path, either_way):
    assert hash_of(packed) == hash_of(packed, expected=sha256_of(packed)) == sha256_of(packed)


def test_zeroed_tokens_and_one_changed_bit_are_found(packed: Path, either_way):
    content = bytearray((packed / "tokens.bin").read_bytes())
    content[-1] ^= 1
    for damaged in (bytes(content), bytes(len(content))):
        (packed / "tokens.bin").write_bytes(damaged)
        with pytest.raises(DamagedTokens, match=f"{packed}/tokens.bin is not what was written.*delete {packed}, and"):
            hash_of(packed)


def test_a_file_without_a_hash_is_used_and_held_to_the_checkpoints(packed: Path, either_way, caplog):
    """So were token files once written. There is nothing to compare them with but what a checkpoint says."""
    change_about(packed, sha256=None)
    assert hash_of(packed) == sha256_of(packed)
    assert f"{packed} has no hash" in caplog.text
    zero(packed)
    with pytest.raises(DamagedTokens, match="other tokens than when the checkpoint was written"):
        hash_of(packed, expected="0" * 64)


def test_a_record_that_was_changed_with_the_file_does_not_hide_it_from_a_resumed_run(packed: Path, either_way):
    before = sha256_of(packed)
    zero(packed)
    change_about(packed, sha256=sha256_of(packed))
    assert hash_of(packed)
    with pytest.raises(DamagedTokens, match="other tokens than when the checkpoint was written"):
        hash_of(packed, expected=before)


def test_a_disk_that_cannot_be_read_is_one_line(packed: Path, either_way, monkeypatch):
    def read(file, directory):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(token_check, "_read", read)
    with pytest.raises(DamagedTokens, match=r"tokens.bin: cannot be read \(Input/output error\)"):
        hash_of(packed)


def test_a_folder_that_is_removed_meanwhile_is_read_to_its_end(packed: Path, monkeypatch):
    expected, read = sha256_of(packed), token_check._read
    monkeypatch.setattr(token_check, "_read", lambda *args: shutil.rmtree(packed) or read(*args))
    assert hash_of(packed) == expected


def test_reading_a_file_that_memory_cannot_hold_leaves_the_memory_to_others(packed: Path, monkeypatch):
    dropped: list[int] = []
    monkeypatch.setattr(token_check, "BLOCK", 100)
    monkeypatch.setattr(os, "posix_fadvise", lambda file, start, n, advice: dropped.append(n))
    hash_of(packed)
    assert not dropped
    little = psutil.virtual_memory()._replace(available=200)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: little)
    hash_of(packed)
    assert sum(dropped) == (packed / "tokens.bin").stat().st_size


@pytest.mark.parametrize(
    "content,problem",
    [
        (b"", "Expecting value"),
        (b'{"tokens": 3', "delimiter"),
        (b"\xff\xfe", "codec"),
        (b"[" * 100_000, "recursion"),
        (b"[]", '"tokens"'),
        (b'{"dtype": "uint16"}', '"tokens"'),
        (b'{"tokens": -4, "dtype": "uint16"}', '"tokens"'),
        (b'{"tokens": true, "dtype": "uint16"}', '"tokens"'),
        (b'{"tokens": 1e3, "dtype": "uint16"}', '"tokens"'),
        (b'{"tokens": 4}', '"dtype"'),
        (b'{"tokens": 4, "dtype": "object"}', '"dtype"'),
        (b'{"tokens": 4, "dtype": ["uint16"]}', '"dtype"'),
        (b'{"tokens": 4, "dtype": "uint16", "sha256": "abc"}', '"sha256"'),
        (b'{"tokens": 4, "dtype": "uint16", "sha256": 4}', '"sha256"'),
    ],
)
def test_a_damaged_record_is_one_line(packed: Path, content: bytes, problem: str):
    (packed / "about.json").write_bytes(content)
    with pytest.raises(
        ValueError, match=f"{packed}/about.json: is damaged .*{problem}.*; delete {packed}, and"
    ) as error:
        read_about(packed)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize("name", ["about.json", "tokens.bin", "."])
def test_what_is_missing_is_one_line(packed: Path, name: str):
    if name == ".":
        shutil.rmtree(packed)
        packed.write_text("a file")
    else:
        (packed / name).unlink()
    with pytest.raises(ValueError, match=f"{packed}/.*: cannot be read .*delete {packed}, and the next run"):
        read_about(packed)
