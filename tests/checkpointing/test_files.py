"""Checkpoints are whole or absent, and a bad one is told from a good one: what a directory holds, its round trip,
saves that end on their way, and every file of it damaged in every way.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from checkpointing import files
from checkpointing.files import (
    SMALL,
    STATE_FILE,
    SUMS_FILE,
    checkpoint_bytes,
    checkpoint_dir,
    data_file,
    deal_weights,
    find_checkpoints,
    hash_check,
    keep_newest,
    model_file,
    open_optimizer,
    optimizer_file,
    partial_dir,
    point_latest_to,
    publish,
    quick_check,
    read_position,
    read_state,
    read_sums,
    remove_partial,
    set_bad_aside,
    write_common,
    write_part,
)
from llamba import LlambaForCausalLM
from model_utils import apply_replacements, freeze_student_mlps, locate_model
from tests import fresh
from tests.tiny import tiny_student, tiny_teacher, tokens

ROOT = Path(__file__).parents[2]
STATE = {"micro_step": 7, "step": 3, "arguments": {"layers": [1, 3], "log_file": None, "max_lr": 1e-5}}


class Killed(Exception):
    """Stands for whatever ends a save on its way."""


def make_tokenizer():
    words = {word: index for index, word in enumerate(["<unk>", "<eos>", *"abcdefgh"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", eos_token="<eos>")


def make_hybrid(dtype=torch.float32, **changes):
    student = tiny_student(**changes)
    apply_replacements(student, tiny_teacher(), [1, 3])
    return student.to(dtype)


@pytest.fixture(scope="module")
def hybrid():
    return make_hybrid()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def shard_of(student, names, seed):
    """Made-up moments of the parameters that a rank has."""
    g = torch.Generator().manual_seed(seed)
    shapes = {name: parameter.shape for name, parameter in student.named_parameters() if name in names}
    return {f"exp_avg/{name}": torch.randn(shape, generator=g) for name, shape in shapes.items()}


def save(output_dir, student, tokenizer, micro_step=7, world_size=1, seed=0):
    """What `world_size` ranks do, one after the other."""
    partial = partial_dir(output_dir, micro_step)
    weights = student.state_dict()
    shares = deal_weights(weights, world_size)
    for rank in reversed(range(world_size)):
        own = {name: weights[name] for name in shares[rank]}
        position = {"windows": 10 * micro_step + seed, "of": rank}
        write_part(partial, rank, world_size, own, shard_of(student, shares[rank], seed + rank), position)
    state = {**STATE, "micro_step": micro_step, "world_size": world_size}
    write_common(partial, student, shares, tokenizer, state)
    return publish(partial, output_dir, micro_step)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def visible(folder):
    """What a user, a glob, and the check of the next run take for checkpoints."""
    return sorted(path.name for path in folder.glob("checkpoint-*"))


# --- content -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world_size", [1, 3])
def test_a_checkpoint_holds_what_a_run_needs(tmp_path, hybrid, tokenizer, world_size):
    path = save(tmp_path, hybrid, tokenizer, world_size=world_size)
    assert path == tmp_path / "checkpoint-7" == checkpoint_dir(tmp_path, 7)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]
    parts = [name(rank, world_size) for rank in range(world_size) for name in (model_file, optimizer_file, data_file)]
    common = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", STATE_FILE, SUMS_FILE}
    index = {"model.safetensors.index.json"} if world_size > 1 else set()
    assert contents(path).keys() >= {*parts, *common, *index}
    assert not any(name.startswith(".") for name in contents(path))
    assert read_state(path) == {**STATE, "world_size": world_size}
    assert [read_position(path, rank, world_size) for rank in range(world_size)] == [
        {"windows": 70, "of": rank} for rank in range(world_size)
    ]
    assert STATE_FILE == "training_state.json"
    assert locate_model("--student_model", str(path), local_files_only=True) == str(path)
    assert quick_check(path) is None and hash_check(path, read_sums(path)) is None


@pytest.mark.parametrize("world_size", [1, 3])
def test_sha256sum_reads_the_sums(tmp_path, hybrid, tokenizer, world_size):
    path = save(tmp_path, hybrid, tokenizer, world_size=world_size)
    result = subprocess.run(["sha256sum", "--strict", "-c", SUMS_FILE], cwd=path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    listed = re.findall(r"^(.*): OK$", result.stdout, flags=re.MULTILINE)
    assert sorted(listed) == sorted(contents(path).keys() - {SUMS_FILE})  # every file, and each once


@pytest.mark.parametrize("world_size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tied", [False, True])
def test_round_trip(tmp_path, tokenizer, dtype, world_size, tied):
    student = make_hybrid(dtype, tie_embeddings=tied)
    path = save(tmp_path, student, tokenizer, world_size=world_size)
    loaded = AutoModelForCausalLM.from_pretrained(path, dtype="auto").eval()
    assert isinstance(loaded, LlambaForCausalLM)
    assert loaded.config.attention_layers == [1, 3]
    assert loaded.config.attention_cfg == student.config.attention_cfg
    assert (loaded.lm_head.weight is loaded.backbone.embedding.weight) is tied
    saved, found = student.state_dict(), loaded.state_dict()
    assert saved.keys() == found.keys()
    for name in saved:
        assert found[name].dtype == dtype
        assert torch.equal(saved[name], found[name]), name
    with torch.no_grad():
        assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)
    reloaded = AutoTokenizer.from_pretrained(path)
    assert reloaded("a b hh h").input_ids == tokenizer("a b hh h").input_ids == [2, 3, 0, 9]
    assert reloaded.eos_token == "<eos>"


def test_the_index_is_true(tmp_path, tokenizer):
    student = make_hybrid(tie_embeddings=True)
    path = save(tmp_path, student, tokenizer, world_size=3)
    index = json.loads((path / "model.safetensors.index.json").read_text())
    found = {}
    for rank in range(3):
        with safe_open(path / model_file(rank, 3), "pt") as file:
            assert file.metadata() == {"format": "pt"}
            found |= {name: (model_file(rank, 3), file.get_tensor(name).nbytes) for name in file.keys()}  # noqa: SIM118
    assert index["weight_map"] == {name: file for name, (file, _) in found.items()}
    assert index["metadata"]["total_size"] == sum(size for _, size in found.values())


@pytest.mark.parametrize("world_size", [1, 2, 3, 5, 100])
@pytest.mark.parametrize("tied", [False, True])
def test_every_weight_is_dealt_once_and_shares_are_even(world_size, tied):
    weights = make_hybrid(tie_embeddings=tied).state_dict()
    shares = deal_weights(weights, world_size)
    dealt = [name for share in shares for name in share]
    assert len(shares) == world_size and len(dealt) == len(set(dealt))
    assert weights.keys() - set(dealt) == ({"lm_head.weight"} if tied else set())
    loads = [sum(weights[name].nbytes for name in share) for share in shares]
    assert max(loads) - min(loads) <= max(tensor.nbytes for tensor in weights.values())
    assert shares == deal_weights(dict(weights), world_size)  # every rank deals alike


def test_a_shard_is_found_by_names_whoever_wrote_it(tmp_path, hybrid, tokenizer):
    path = save(tmp_path, hybrid, tokenizer, world_size=3)
    opened = open_optimizer(path, 3)
    shares = deal_weights(hybrid.state_dict(), 3)
    expected = {}
    for rank in range(3):
        expected |= shard_of(hybrid, shares[rank], rank)
        assert load_file(path / optimizer_file(rank, 3)).keys() == shard_of(hybrid, shares[rank], rank).keys()
    assert opened.keys() == expected.keys() and len(expected) == len(list(hybrid.parameters()))
    assert all(torch.equal(opened[name].get_tensor(name), value) for name, value in expected.items())


def test_saving_leaves_the_student_as_it_was(tmp_path, hybrid, tokenizer):
    before = {name: value.clone() for name, value in hybrid.state_dict().items()}
    save(tmp_path, hybrid, tokenizer, world_size=2)
    assert all(torch.equal(before[name], value) for name, value in hybrid.state_dict().items())
    assert not hybrid.training


def test_the_size_of_a_checkpoint_is_known_beforehand(tmp_path, tokenizer):
    """From the shapes: weights, and two or three float32 of what is trained."""
    for dtype, kinds in ((torch.float32, 2), (torch.bfloat16, 3)):
        student = make_hybrid(dtype)
        freeze_student_mlps(student)
        trained = [p.numel() for p in student.parameters() if p.requires_grad]
        weights = sum(p.nbytes for p in student.parameters())
        assert checkpoint_bytes(student) == weights + 4 * kinds * sum(trained)
        assert 0 < len(trained) < len(list(student.parameters()))


# --- saves that do not come to their end ---------------------------------------------------------------------


def fail(*args, **kwargs):
    raise Killed


STAGES = {
    "before the weights": (files, "save_file"),
    "before the sums of a part": (files, "sha256"),
    "before the tokenizer": (PreTrainedTokenizerFast, "save_pretrained"),
    "before the state": (Path, "write_text"),
    "before a flush": (files, "flush_to_disk"),
    "before the rename": (Path, "rename"),
}


@pytest.mark.parametrize("stage", STAGES)
def test_a_save_that_fails_leaves_no_checkpoint(tmp_path, hybrid, tokenizer, monkeypatch, stage):
    with monkeypatch.context() as patch:
        patch.setattr(*STAGES[stage], fail)
        with pytest.raises(Killed):
            save(tmp_path, hybrid, tokenizer, world_size=2)
        assert visible(tmp_path) == [] == find_checkpoints(tmp_path)
    remove_partial(tmp_path)
    assert list(tmp_path.iterdir()) == []
    path = save(tmp_path, hybrid, tokenizer, world_size=2)
    assert AutoModelForCausalLM.from_pretrained(path).config.attention_layers == [1, 3]
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]


def test_all_is_flushed_before_the_rename_and_the_rename_after_it(tmp_path, hybrid, tokenizer, monkeypatch):
    """A machine that loses power must not find the name without the content."""
    events = []
    rename = Path.rename
    monkeypatch.setattr(files, "flush_to_disk", lambda path: events.append(path.name))
    monkeypatch.setattr(Path, "rename", lambda own, target: events.append("rename") or rename(own, target))
    path = save(tmp_path, hybrid, tokenizer, world_size=2)
    before, after = events[: events.index("rename")], events[events.index("rename") + 1 :]
    assert set(before) > set(contents(path))
    assert before[-2:] == [SUMS_FILE, partial_dir(tmp_path, 7).name]  # the folder's own entries last
    assert after == [tmp_path.name]


def test_what_cannot_be_json_leaves_no_checkpoint(tmp_path, hybrid, tokenizer):
    weights = hybrid.state_dict()
    with pytest.raises(TypeError):
        write_part(partial_dir(tmp_path, 7), 0, 1, weights, {}, position=Path("x"))
    with pytest.raises(TypeError):
        write_common(partial_dir(tmp_path, 7), hybrid, [list(weights)], tokenizer, {"path": Path("x")})
    assert visible(tmp_path) == []


def test_an_existing_checkpoint_is_left_alone(tmp_path, hybrid, tokenizer):
    path = save(tmp_path, hybrid, tokenizer)
    before = contents(path)
    with pytest.raises(FileExistsError, match="checkpoint-7 exists already"):
        save(tmp_path, tiny_student(), tokenizer)
    assert contents(path) == before
    remove_partial(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["checkpoint-7"]


@pytest.mark.parametrize("attempt", [0, 1, 12])
def test_each_try_has_a_folder_of_its_own_that_nobody_sees(tmp_path, attempt):
    partial = partial_dir(tmp_path, 7, attempt)
    partial.mkdir()
    (partial / "model-00001-of-00009.safetensors").write_bytes(b"half a weigh")
    (tmp_path / ".deleted-checkpoint-3").mkdir()
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / ".lock").touch()
    assert visible(tmp_path) == ["checkpoint-5"]
    remove_partial(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "checkpoint-5"]
    assert len({partial_dir(tmp_path, 7, n) for n in range(20)}) == 20


def kill_saves(folder):
    """Saves over and over, each time in a process that dies at another flush; returns the first that none came to."""
    student, tokenizer = tiny_student(), make_tokenizer()
    save(folder, student, tokenizer, 1, world_size=2)
    flush, calls = os.fsync, []
    for n in range(2, 100):
        kill_at = n - 1
        child = os.fork()
        if not child:

            def flush_or_die(descriptor, kill_at=kill_at):
                calls.append(descriptor)
                if len(calls) == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                flush(descriptor)

            os.fsync = flush_or_die
            save(folder, student, tokenizer, n, world_size=2)
            os._exit(0)
        _, status = os.waitpid(child, 0)
        if not os.WIFSIGNALED(status):
            assert status == 0
            return kill_at


def test_a_process_that_is_killed_while_saving(tmp_path, hybrid, tokenizer):
    """With kill -9 at every flush of a save, one after the other."""
    last = fresh.call(kill_saves, tmp_path)  # the flush that a whole save does not come to
    n_files = len(contents(tmp_path / "checkpoint-1"))
    assert last == n_files + 3 + 1 + 1 + 1  # files, lists of sums, the folder, the rename; and one more
    # Who dies at the last flush has renamed already; everybody else has left nothing that looks like a checkpoint.
    assert visible(tmp_path) == ["checkpoint-1", f"checkpoint-{last}", f"checkpoint-{last + 1}"]
    for path in find_checkpoints(tmp_path):
        assert quick_check(path) is None and hash_check(path, read_sums(path)) is None
    assert len(list(tmp_path.glob(".partial-checkpoint-*"))) == last - 2
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-1").config.attention_layers == []
    remove_partial(tmp_path)
    save(tmp_path, hybrid, tokenizer, 2)
    assert not list(tmp_path.glob(".partial-checkpoint-*"))


# --- a bad one is told from a good one -----------------------------------------------------------------------

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
    """As a run that goes on finds it: the quick check, then the hashes of what it left out."""
    return quick_check(path) or hash_check(path, read_sums(path))


@pytest.fixture(scope="module", params=[1, 3], ids=["1 rank", "3 ranks"])
def saved(request, tmp_path_factory, hybrid, tokenizer):
    """A checkpoint, and one of the same step of another run."""
    folder = tmp_path_factory.mktemp("saved")
    other = make_hybrid(tie_embeddings=True)
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
    """Large files are not hashed by the quick check, which finds all the same when they are missing or cut short."""
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
def test_a_state_that_says_something_else_under_its_right_sum(saved, text):
    """What a hash cannot tell: it was written so."""
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


# --- housekeeping --------------------------------------------------------------------------------------------


@pytest.fixture
def numbered(tmp_path):
    """A directory with checkpoints of these steps, each with its step in a file, and with what is none."""
    for step in (0, 5, 10, 100, 20):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "step").write_text(str(step))
    for name in ("checkpoint-best", "checkpoint-30.old", "bad-checkpoint-7", ".partial-checkpoint-200-0", "wandb"):
        (tmp_path / name).mkdir()
    return tmp_path


def steps(folder):
    return [files.step_of(path) for path in find_checkpoints(folder)]


def test_the_newest_is_the_first(numbered):
    assert steps(numbered) == [100, 20, 10, 5, 0]
    assert find_checkpoints(numbered / "absent") == []


@pytest.mark.parametrize("limit,kept", [(1, [100]), (2, [100, 20]), (4, [100, 20, 10, 5]), (9, [100, 20, 10, 5, 0])])
def test_the_newest_are_kept_and_nothing_else_is_touched(numbered, limit, kept):
    others = {path.name for path in numbered.iterdir()} - set(visible(numbered)) | {"checkpoint-best"}
    keep_newest(numbered, limit)
    assert steps(numbered) == kept
    assert others <= {path.name for path in numbered.iterdir()}
    assert all(
        (path / "step").read_text() == path.name.removeprefix("checkpoint-") for path in find_checkpoints(numbered)
    )
    assert not list(numbered.glob(".deleted-*"))


def test_a_deletion_that_is_cut_short_leaves_no_half_checkpoint(numbered, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shutil, "rmtree", fail)
        keep_newest(numbered, 4)
    assert steps(numbered) == [100, 20, 10, 5]
    assert (numbered / ".deleted-checkpoint-0").is_dir()
    remove_partial(numbered)
    assert not list(numbered.glob(".*"))
    assert steps(numbered) == [100, 20, 10, 5]


def test_bad_ones_are_moved_aside_and_never_over_one_another(tmp_path, caplog):
    for content in ("first", "second", "third"):
        path = tmp_path / "checkpoint-7"
        path.mkdir()
        (path / "file").write_text(content)
        set_bad_aside(path, f"{content} is bad")
        assert find_checkpoints(tmp_path) == []
        assert f"({content} is bad)" in caplog.messages[-1]
    names = ["bad-checkpoint-7", "bad-checkpoint-7-2", "bad-checkpoint-7-3"]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    assert [(tmp_path / name / "file").read_text() for name in names] == ["first", "second", "third"]


def test_latest_names_the_newest(numbered):
    for step in (5, 20):
        point_latest_to(numbered / f"checkpoint-{step}")
        assert (numbered / "latest" / "step").read_text() == str(step)
        assert os.readlink(numbered / "latest") == f"checkpoint-{step}"  # also where the directory is moved
    (numbered / ".latest").symlink_to("nowhere")  # as a crash between two steps leaves it
    point_latest_to(numbered / "checkpoint-100")
    assert os.readlink(numbered / "latest") == "checkpoint-100"
    assert steps(numbered) == [100, 20, 10, 5, 0] and not (numbered / ".latest").is_symlink()


def test_a_latest_that_somebody_made_a_folder_stays(numbered):
    (numbered / "latest").mkdir()
    (numbered / "latest" / "mine").touch()
    with pytest.raises(OSError):
        point_latest_to(numbered / "checkpoint-5")
    assert (numbered / "latest" / "mine").exists()
