"""Every file of a checkpoint damaged in every way: the checks find it and name the file."""

import hashlib
import json
import re

import pytest
import torch

from checkpointing import files
from checkpointing.files import (
    SMALL,
    STATE_FILE,
    SUMS_FILE,
    hash_check,
    quick_check,
    read_state,
    read_sums,
)
from tests.checkpointing.saved_checkpoints import contents, save
from tests.tiny import tiny_hybrid

DAMAGES = {
    "truncated": lambda content, other: content[: len(content) // 2],
    "its last byte cut off": lambda content, other: content[:-1],
    "one bit flipped": lambda content, other: flip(content, 4 * len(content)),
    "the last bit flipped": lambda content, other: flip(content, 8 * len(content) - 1),
    "emptied": lambda content, other: b"",
    "deleted": lambda content, other: None,
    "another run's": lambda content, other: other,
}


def flip(content, bit):
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def put(file, content):
    if content is None:
        file.unlink(missing_ok=True)
    else:
        file.write_bytes(content)


def problem_of(path):
    """Returns what a resumed run finds: the quick check first, then the hashes of the files that it left out."""
    return quick_check(path) or hash_check(path, read_sums(path))


@pytest.fixture(scope="module", params=[1, 3], ids=["1 rank", "3 ranks"])
def saved(request, tmp_path_factory, hybrid, tokenizer):
    """Returns a checkpoint and the files of a checkpoint of the same step of another run."""
    folder = tmp_path_factory.mktemp("saved")
    other = tiny_hybrid(tie_embeddings=True)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(0.5)
    (folder / "other").mkdir()
    another_run = save(folder / "other", other, tokenizer, world_size=request.param, seed=100)
    (another_run / STATE_FILE).write_text(json.dumps({**read_state(another_run), "step": 4}))
    return save(folder, hybrid, tokenizer, world_size=request.param), contents(another_run)


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("small", [SMALL, 0], ids=["small files", "large files"])
def test_damage_to_any_file_is_found_and_named(saved, monkeypatch, small, damage):
    """The quick check hashes no large file, but it finds those that are missing or cut short."""
    path, others = saved
    monkeypatch.setattr(files, "SMALL", small)
    assert problem_of(path) is None
    damaged = []
    for name, content in contents(path).items():
        new = DAMAGES[damage](content, others.get(name))
        if name == SUMS_FILE or new == content or (name == STATE_FILE and not small):  # never large, this one
            continue
        put(path / name, new)
        found, quickly = problem_of(path), quick_check(path)
        put(path / name, content)
        assert found is not None and name in found, found
        is_cut = damage in ("truncated", "its last byte cut off", "emptied") and name.endswith(".safetensors")
        if small or damage == "deleted" or is_cut:
            assert quickly == found
        damaged.append(name)
    assert problem_of(path) is None
    assert len(damaged) >= 4


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_to_the_sums_is_found(saved, damage):
    path, others = saved
    content = (path / SUMS_FILE).read_bytes()
    put(path / SUMS_FILE, DAMAGES[damage](content, others[SUMS_FILE]))
    found = quick_check(path)
    put(path / SUMS_FILE, content)
    if damage in ("its last byte cut off", "the last bit flipped"):  # of the newline: the sums are all there
        assert found is None or SUMS_FILE in found
    else:
        assert found is not None
    if damage in ("truncated", "emptied", "deleted"):
        assert SUMS_FILE in found


def test_sums_that_were_cut_short_anywhere(saved):
    path, _ = saved
    content = (path / SUMS_FILE).read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for end in [0, *ends[:-1], *range(1, len(content) - 1, 7)]:
        put(path / SUMS_FILE, content[:end])
        assert SUMS_FILE in str(quick_check(path)), content[:end]
    put(path / SUMS_FILE, content)
    assert quick_check(path) is None


def test_no_flipped_bit_of_the_sums_goes_unseen(saved):
    path, _ = saved
    content, sums = (path / SUMS_FILE).read_bytes(), read_sums(path)
    for bit in range(0, 8 * len(content), 61):
        put(path / SUMS_FILE, flip(content, bit))
        assert problem_of(path) is not None or read_sums(path) == sums, bit
    put(path / SUMS_FILE, content)


@pytest.mark.parametrize("text", ["[1]", "{}", '{"world_size": "many"}', "nonsense", '{"world_size": 9}'])
def test_a_wrong_state_under_its_right_sum_is_found(saved, text):
    """A hash cannot find this: the file was written so."""
    path, _ = saved
    before = contents(path)
    (path / STATE_FILE).write_text(text)
    digest = hashlib.sha256(text.encode()).hexdigest()
    sums = re.sub(rf"\w+(?=  {STATE_FILE})", digest, before[SUMS_FILE].decode())
    (path / SUMS_FILE).write_text(sums)
    found = quick_check(path)
    for name in (STATE_FILE, SUMS_FILE):
        put(path / name, before[name])
    assert found is not None


def test_a_folder_without_sums_or_none_at_all_is_bad(tmp_path):
    assert quick_check(tmp_path / "checkpoint-3") == f"{SUMS_FILE} is missing"
    (tmp_path / "checkpoint-3").mkdir()
    assert quick_check(tmp_path / "checkpoint-3") == f"{SUMS_FILE} is missing"


def test_names_that_lead_out_of_a_checkpoint_are_not_followed(saved):
    path, _ = saved
    content = (path / SUMS_FILE).read_bytes()
    for name in ("../outside", "/etc/passwd", "a b"):
        put(path / SUMS_FILE, content + f"{'0' * 64}  {name}\n".encode())
        found = quick_check(path)
        assert found is not None and f"{SUMS_FILE} is no list of SHA-256 sums" in found
    put(path / SUMS_FILE, content)
