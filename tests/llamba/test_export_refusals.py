"""What `python -m llamba.export` refuses: one line on standard error, before anything is written."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from llamba.export import main
from tests.llamba.exports import TEACHER, VOCAB, WEIGHTS, save_checkpoint
from tests.model_files import Command, change_json
from tests.tiny import tiny_hybrid, tiny_student


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"), tiny_hybrid(vocab_size=VOCAB), world_size=2)


@pytest.fixture
def checkpoint(original, tmp_path):
    """Copies the checkpoint, to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint-24"))


def export_error(capsys, *command_line):
    """Returns the one line on standard error of a call that fails."""
    assert main([str(word) for word in command_line]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_weight(folder):
    weights = load_file(folder / WEIGHTS[0])
    weights.pop(min(weights))
    save_file(weights, folder / WEIGHTS[0])


def round_a_weight(folder):
    weights = load_file(folder / WEIGHTS[0])
    weights[min(weights)] = weights[min(weights)].to(torch.int8)
    save_file(weights, folder / WEIGHTS[0])


def without_sums(damage):
    """Does the damage where no SHA256SUMS reveals it."""

    def both(folder):
        (folder / "SHA256SUMS").unlink()
        damage(folder)

    return both


def flip_a_byte(file):
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGE = {
    "no config": (lambda f: (f / "config.json").unlink(), "has no config.json"),
    "no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json cannot be read"),
    "no object": (lambda f: (f / "config.json").write_text("[]"), "config.json holds a list"),
    "llama": (lambda f: shutil.copy(TEACHER / "config.json", f), "model_type 'llama'; expected 'llamba'"),
    "no type": (lambda f: (f / "config.json").write_text("{}"), "model_type None; expected 'llamba'"),
    "no model": (lambda f: change_json(f / "config.json", n_layer=0), "n_layer=0: expected a whole number"),
    "edited": (lambda f: change_json(f / "config.json", norm_epsilon=1e-3), "config.json is not what was written"),
    "no shard": (lambda f: (f / WEIGHTS[1]).unlink(), f"weight shards are missing: {WEIGHTS[1]}"),
    "no weights": (lambda f: [file.unlink() for file in f.glob("model*")], "has no weights"),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "path": (
        lambda f: change_json(f / "model.safetensors.index.json", weight_map={"a": "../b.safetensors"}),
        "names ../b.safetensors; expected names of files beside it",
    ),
    "quantised": (
        without_sums(lambda f: change_json(f / "config.json", quantization_config={"quant_method": "fp8"})),
        "its weights are quantised, by fp8 as config.json says; supported are float32",
    ),
    "an integer": (without_sums(round_a_weight), " is int8; supported are float32"),
    "cut short": (lambda f: cut_short(f / WEIGHTS[0]), f"{WEIGHTS[0]} cannot be read as weights"),
    "empty": (lambda f: (f / WEIGHTS[0]).write_bytes(b""), f"{WEIGHTS[0]} cannot be read as weights"),
    "lacking": (drop_a_weight, "missing: "),
    "misshapen": (
        without_sums(lambda f: change_json(f / "config.json", vocab_size=512)),
        "misshapen: backbone.embedding",
    ),
    "unexpected": (
        without_sums(lambda f: change_json(f / "config.json", n_layer=3, attention_layers=[1])),
        "unexpected: ",
    ),
    "weights": (lambda f: flip_a_byte(f / WEIGHTS[1]), f"{WEIGHTS[1]} is not what was written"),
    "tokenizer": (
        lambda f: change_json(f / "tokenizer_config.json", a=1),
        "tokenizer_config.json is not what was written",
    ),
    "sums": (lambda f: (f / "SHA256SUMS").write_text("?\n"), "SHA256SUMS is not a list"),
    "state": (without_sums(lambda f: (f / "training_state.json").write_text("{}")), "training_state.json is not that"),
}


@pytest.mark.parametrize("damage,message", DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_that_cannot_be_exported(checkpoint, tmp_path, capsys, damage, message):
    damage(checkpoint)
    error = export_error(capsys, checkpoint, tmp_path / "out")
    assert f"CKPT {checkpoint}: " in error and message in error
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 3}, {"a": "print"}], ids=["list", "number", "text"])
def test_a_bin_file_that_holds_no_weights(tmp_path, capsys, content):
    tiny_student().config.save_pretrained(tmp_path / "bin")
    torch.save(content, tmp_path / "bin" / "pytorch_model.bin")
    error = export_error(capsys, tmp_path / "bin", tmp_path / "out")
    assert f"CKPT {tmp_path / 'bin'}: pytorch_model.bin cannot be read as weights" in error


def test_a_bin_file_that_runs_code_is_refused(tmp_path, capsys):
    tiny_student().config.save_pretrained(tmp_path / "bin")
    torch.save({"a": Command(tmp_path / "marker")}, tmp_path / "bin" / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read as weights" in export_error(capsys, tmp_path / "bin", tmp_path / "out")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_checkpoint_that_is_no_directory(tmp_path, capsys, name):
    (tmp_path / "file").touch()
    error = export_error(capsys, tmp_path / name, tmp_path / "out")
    assert f"CKPT {tmp_path / name}: is not a directory; expected a checkpoint" in error
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_out_that_is_taken(original, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("full", "file", "link"):
        error = export_error(capsys, original, tmp_path / name)
        assert f"OUT {tmp_path / name}: exists and is not an empty directory; name another" in error
    assert f"OUT {tmp_path / 'file' / 'out'}: cannot be written" in export_error(
        capsys, original, tmp_path / "file" / "out"
    )
    assert sorted(file.name for file in tmp_path.rglob("*")) == ["file", "full", "link", "mine"]


def test_out_appears_whole_or_not_at_all(original, tmp_path, capsys, monkeypatch):
    seen = []

    def fail(error):
        def sync(_):
            seen.append([file.name for file in tmp_path.iterdir()])
            if len(seen) % 3 == 0:
                raise error

        return sync

    monkeypatch.setattr(os, "fsync", fail(OSError(28, "No space left on device")))
    assert f"OUT {tmp_path / 'out'}: cannot be written: [Errno 28] No space" in export_error(
        capsys, original, tmp_path / "out"
    )
    monkeypatch.setattr(os, "fsync", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        main([str(original), str(tmp_path / "out")])
    assert [len(names) for names in seen] == [1] * 6 and ["out"] not in seen
    assert list(tmp_path.iterdir()) == []
