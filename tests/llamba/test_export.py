"""`python -m llamba.export`: what it makes loads and runs in a fresh process without this repository, and gives the
same logits bit for bit; it goes on as a student and can be exported again; what is wrong is one line before anything
is written.
"""

import dataclasses
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from arguments import parse_train_args
from checkpointing.files import deal_weights, partial_dir, publish, write_common, write_part
from llamba import LlambaForCausalLM, card, export
from llamba.export import main
from model_utils import apply_replacements, get_configs, get_student_model, get_tokenizer, locate_model
from tests.tiny import tiny_student, tiny_teacher, tokens

ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "presets" / "tiny" / "teacher"
CODE = {"cache.py", "configuration.py", "kernels.py", "mixer.py", "modeling.py", "ssd.py"}
WEIGHTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
RUN = ["--teacher_model", "meta-llama/Llama-3.1-8B-Instruct", "--student_model", "./somewhere/student"]
RUN += ["--layers", "1", "3", "--output_dir", "somewhere"]


def make_hybrid(dtype=torch.float32):
    student = tiny_student(vocab_size=1024).to(dtype)
    apply_replacements(student, tiny_teacher(vocab_size=1024), [1, 3])
    return student


def save_checkpoint(folder, student, world_size, options=RUN):
    """As a run of so many ranks saves it."""
    args = parse_train_args(options)
    state = {"format": 1, "micro_step": 24, "step": 12, "tokens": 4096, "arguments": dataclasses.asdict(args)}
    weights, partial = student.state_dict(), partial_dir(folder, 24)
    shares = deal_weights(weights, world_size)
    folder.mkdir(exist_ok=True)
    for rank, share in enumerate(shares):
        optimizer = {f"exp_avg/{rank}": torch.zeros(3)}
        write_part(partial, rank, world_size, {name: weights[name] for name in share}, optimizer, {"row": 1})
    write_common(partial, student, shares, AutoTokenizer.from_pretrained(TEACHER), state)
    return publish(partial, folder, 24)


@pytest.fixture(scope="module")
def hybrid():
    return make_hybrid()


@pytest.fixture(scope="module")
def original(hybrid, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"), hybrid, world_size=2)


@pytest.fixture
def checkpoint(original, tmp_path):
    """A copy to be damaged."""
    return Path(shutil.copytree(original, tmp_path / "checkpoint-24"))


@pytest.fixture(scope="module")
def exported(original, tmp_path_factory):
    out = tmp_path_factory.mktemp("exported") / "my-hybrid.v1"
    assert main([str(original), str(out)]) == 0
    return out


# --- in a fresh process --------------------------------------------------------------------------------------

FRESH = """
    import json, sys
    from pathlib import Path
    import torch
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

    torch.set_num_threads(1)
    folders, results = [Path(folder) for folder in sys.argv[1:]], Path("results")
    results.mkdir()
    ids = torch.arange(40).view(2, 20)
    mask = torch.ones_like(ids)
    for folder in folders:
        name = folder.name
        config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        options = dict(max_new_tokens=8, do_sample=False)
        found = dict(attention_layers=config.attention_layers, dtype=str(model.dtype), eos=model.config.eos_token_id)
        found["tokens"] = model.generate(ids, attention_mask=mask, pad_token_id=0, **options).tolist()
        write = pipeline("text-generation", str(folder), trust_remote_code=True)
        found["text"] = write("Where is the cat?", **options)[0]["generated_text"]

        again = Path("again") / name
        model.save_pretrained(again)
        tokenizer.save_pretrained(again)
        loaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
        with torch.no_grad():
            logits = dict(first=model(ids).logits, again=loaded(ids).logits)
        save_file(logits, results / f"{name}.safetensors")

        code = (folder / "README.md").read_text().split("```python\\n")[1].split("```")[0]
        exec(code.replace("PATH", str(folder)))
        (results / f"{name}.json").write_text(json.dumps(found))
    ours = [name for name in sys.modules if name.split(".")[0] == "llamba"]
    (results / "process.json").write_text(json.dumps(dict(ours=ours, path=sys.path)))
"""


@pytest.fixture(scope="module")
def fresh(exported, hybrid, tmp_path_factory):
    """What a user without this repository gets, of a float32 hybrid in shards and of a bfloat16 one in one file."""
    folder = tmp_path_factory.mktemp("fresh")
    half = save_checkpoint(folder / "run", make_hybrid(torch.bfloat16), world_size=1)
    assert main([str(half), str(folder / "half")]) == 0
    script = folder / "script.py"
    script.write_text(textwrap.dedent(FRESH))
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(script), str(exported), str(folder / "half")]
    process = subprocess.run(
        command, cwd=folder, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=200
    )
    assert process.returncode == 0, process.stderr
    assert "Do you wish to run" not in process.stdout  # it would ask at the terminal
    return folder


def test_a_fresh_process_has_nothing_of_this_repository(fresh):
    process = json.loads((fresh / "results" / "process.json").read_text())
    assert process["ours"] == []
    assert str(ROOT) not in process["path"]


@pytest.mark.parametrize("name,dtype", [("my-hybrid.v1", torch.float32), ("half", torch.bfloat16)])
def test_a_fresh_process_gives_the_same(fresh, name, dtype):
    model = make_hybrid(dtype)
    ids = torch.arange(40).view(2, 20)
    with torch.no_grad():
        expected = model(ids).logits
    logits = load_file(fresh / "results" / f"{name}.safetensors")
    assert logits["first"].dtype == dtype
    assert torch.equal(logits["first"], expected)
    assert torch.equal(logits["again"], expected)
    found = json.loads((fresh / "results" / f"{name}.json").read_text())
    assert found["attention_layers"] == [1, 3]
    assert found["dtype"] == str(dtype)
    options = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    assert found["tokens"] == model.generate(ids, attention_mask=torch.ones_like(ids), **options).tolist()
    assert found["text"].startswith("Where is the cat?") and len(found["text"]) > len("Where is the cat?")


def test_what_is_saved_from_remote_code_is_remote_code_again(fresh):
    assert {file.name for file in (fresh / "again" / "half").iterdir()} >= CODE | TOKENIZER | {"model.safetensors"}
    auto_map = json.loads((fresh / "again" / "half" / "config.json").read_text())["auto_map"]
    assert auto_map == export.AUTO_MAP


# --- what is in it -------------------------------------------------------------------------------------------


def test_only_what_loading_needs_is_copied(exported, original):
    copied = {*WEIGHTS, "model.safetensors.index.json", "generation_config.json", *TOKENIZER}
    assert {file.name for file in exported.iterdir()} == copied | CODE | {"config.json", "README.md"}
    for name in copied:
        assert (exported / name).read_bytes() == (original / name).read_bytes()
    for name in CODE:
        assert (exported / name).read_bytes() == (ROOT / "llamba" / name).read_bytes()
    config = json.loads((original / "config.json").read_text())
    config |= {"architectures": ["LlambaForCausalLM"], "auto_map": export.AUTO_MAP}
    assert json.loads((exported / "config.json").read_text()) == config
    assert sorted(file.name for file in exported.parent.iterdir()) == [exported.name]


def test_it_can_be_read_by_others(exported):
    """Checkpoints' weights are for their owner alone; what is made to be shared follows the umask."""
    assert len({file.stat().st_mode for file in exported.iterdir()}) == 1


def test_the_link_to_the_newest_checkpoint_and_an_empty_directory(original, tmp_path):
    (tmp_path / "latest").symlink_to(original)
    (tmp_path / "deep" / "out").mkdir(parents=True)
    assert main([str(tmp_path / "latest"), str(tmp_path / "deep" / "out")]) == 0
    assert main([str(tmp_path / "latest"), str(tmp_path / "deeper" / "still" / "out")]) == 0
    assert (tmp_path / "deep" / "out" / WEIGHTS[1]).is_file()
    assert (tmp_path / "deeper" / "still" / "out" / "modeling.py").is_file()


@torch.no_grad()
@pytest.mark.parametrize("tied", [False, True])
def test_published_weights_in_a_bin_file(tmp_path, tied):
    student = tiny_student(tie_embeddings=tied)
    student.config.save_pretrained(tmp_path / "bin")
    weights = student.state_dict()
    if tied:
        del weights["lm_head.weight"]
    torch.save(weights, tmp_path / "bin" / "pytorch_model.bin")
    assert main([str(tmp_path / "bin"), str(tmp_path / "out")]) == 0
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    assert torch.equal(loaded(tokens()).logits, student(tokens()).logits)
    card_text = (tmp_path / "out" / "README.md").read_text()
    assert "| dtype | float32 |" in card_text
    assert f"| parameters | {sum(p.numel() for p in student.parameters()):,} |" in card_text
    assert "AutoTokenizer" not in card_text and "| attention layers | none |" in card_text


# --- as this package -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_it_is_a_student_whose_code_is_not_run(exported, hybrid, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "student"))
    for name in CODE:
        (folder / name).write_text("raise SystemExit('was run')")
    _, config = get_configs(str(TEACHER), locate_model("--student_model", str(folder), local_files_only=True))
    assert config.attention_layers == [1, 3]
    assert get_tokenizer("--student_model", str(folder)).eos_token == "<|endoftext|>"
    student = get_student_model(str(folder), torch.float32, torch.device("cpu"))
    for model in (student, AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)):
        assert type(model) is LlambaForCausalLM
        assert torch.equal(model(tokens()).logits, hybrid(tokens()).logits)

    # Its checkpoints hold no code, so they name none.
    student.save_pretrained(tmp_path / "next")
    assert "auto_map" not in json.loads((tmp_path / "next" / "config.json").read_text())
    assert not list((tmp_path / "next").glob("*.py"))


def test_an_export_can_be_exported(exported, tmp_path):
    assert main([str(exported), str(tmp_path / "out")]) == 0
    for file in exported.iterdir():
        if file.name != "README.md":  # the run is not known any more
            assert (tmp_path / "out" / file.name).read_bytes() == file.read_bytes()


# --- the card ------------------------------------------------------------------------------------------------


def parts_of_card(folder):
    front, body = re.fullmatch(r"---\n(.*?)\n---\n(.*)", (folder / "README.md").read_text(), re.S).groups()
    return yaml.safe_load(front), body


def test_the_card_tells_what_the_model_is_and_how_it_was_made(exported, hybrid):
    front, body = parts_of_card(exported)
    assert front["library_name"] == "transformers" and front["pipeline_tag"] == "text-generation"
    assert front["base_model"] == ["meta-llama/Llama-3.1-8B-Instruct"]
    assert front["datasets"] == ["HuggingFaceFW/fineweb-edu"]
    assert "2 of its 4 layers are Mamba-2 mixers" in body
    for row in (
        f"| parameters | {sum(p.numel() for p in hybrid.parameters()):,} |",
        "| dtype | float32 |",
        "| vocabulary | 1,024 |",
        "| attention layers | 1, 3 |",
        "| teacher | meta-llama/Llama-3.1-8B-Instruct |",
        "| student at the start | local |",
        "| layers from the teacher | 1 3 |",
        "| data | HuggingFaceFW/fineweb-edu, CC-MAIN-2014-49, train |",
        "| KL weight | 0.1 |",
    ):
        assert row in body
    assert "optimizer step 12 (micro step 24), when 4,096 tokens" in body


def test_the_card_knows_nothing_of_a_run_that_left_no_state(tmp_path):
    tiny_student().save_pretrained(tmp_path / "plain")
    assert main([str(tmp_path / "plain"), str(tmp_path / "out")]) == 0
    front, body = parts_of_card(tmp_path / "out")
    assert "base_model" not in front and "datasets" not in front
    assert "How it was made" not in body
    assert "All 4 layers are Mamba-2 mixers" in body


def test_no_path_of_this_machine_is_told(hybrid, tmp_path, monkeypatch):
    (tmp_path / "models" / "student").mkdir(parents=True)
    (tmp_path / "data").mkdir()
    options = ["--teacher_model", str(tmp_path / "teacher"), "--student_model", "models/student"]
    options += ["--dataset_name", "data/text.jsonl", "--layers", "1", "3", "--output_dir", str(tmp_path / "run")]
    (tmp_path / "data" / "text.jsonl").touch()
    checkpoint = save_checkpoint(tmp_path / "run", hybrid, 1, options)
    monkeypatch.chdir("/")  # models/student is found from the checkpoint
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "_name_or_path": str(tmp_path)}))
    (checkpoint / "SHA256SUMS").unlink()
    assert main([str(checkpoint), str(tmp_path / "out")]) == 0
    front, body = parts_of_card(tmp_path / "out")
    assert "base_model" not in front and "datasets" not in front
    assert body.count("| local |") == 3
    for file in (tmp_path / "out").iterdir():
        if file.suffix != ".safetensors":
            text = file.read_text()
            assert str(tmp_path) not in text and "models/student" not in text and "data/text" not in text, file.name


def test_the_card_names_what_was_tried():
    requirements = (ROOT / "requirements.txt").read_text()
    assert f"transformers=={card.TESTED.split()[-1]}" in requirements
    assert f"transformers from {'.'.join(card.TESTED.split('.')[:2])}" in " ".join(requirements.split("#")).replace(
        "\n", ""
    )


# --- what is wrong -------------------------------------------------------------------------------------------


def error_of(capsys, *command_line):
    """The one line on standard error of a call that fails."""
    assert main([str(word) for word in command_line]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ") and captured.err.count("\n") == 1
    return captured.err


def change(file, **changes):
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def cut_short(file):
    file.write_bytes(file.read_bytes()[:-100])


def drop_a_weight(folder):
    weights = load_file(folder / WEIGHTS[0])
    weights.pop(min(weights))
    save_file(weights, folder / WEIGHTS[0])


def without_sums(damage):
    """Damage that a directory without SHA256SUMS would hide."""

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
    "no model": (lambda f: change(f / "config.json", n_layer=0), "n_layer=0: expected a whole number"),
    "edited": (lambda f: change(f / "config.json", norm_epsilon=1e-3), "config.json is not what was written"),
    "no shard": (lambda f: (f / WEIGHTS[1]).unlink(), f"weight shards are missing: {WEIGHTS[1]}"),
    "no weights": (lambda f: [file.unlink() for file in f.glob("model*")], "has no weights"),
    "no map": (lambda f: (f / "model.safetensors.index.json").write_text("{}"), "has no weight_map"),
    "path": (
        lambda f: change(f / "model.safetensors.index.json", weight_map={"a": "../b.safetensors"}),
        "names ../b.safetensors; expected names of files beside it",
    ),
    "cut short": (lambda f: cut_short(f / WEIGHTS[0]), f"{WEIGHTS[0]} cannot be read as weights"),
    "empty": (lambda f: (f / WEIGHTS[0]).write_bytes(b""), f"{WEIGHTS[0]} cannot be read as weights"),
    "lacking": (drop_a_weight, "missing: "),
    "misshapen": (without_sums(lambda f: change(f / "config.json", vocab_size=512)), "misshapen: backbone.embedding"),
    "unexpected": (without_sums(lambda f: change(f / "config.json", n_layer=3, attention_layers=[1])), "unexpected: "),
    "weights": (lambda f: flip_a_byte(f / WEIGHTS[1]), f"{WEIGHTS[1]} is not what was written"),
    "tokenizer": (lambda f: change(f / "tokenizer_config.json", a=1), "tokenizer_config.json is not what was written"),
    "sums": (lambda f: (f / "SHA256SUMS").write_text("?\n"), "SHA256SUMS is no list"),
    "state": (without_sums(lambda f: (f / "training_state.json").write_text("{}")), "training_state.json is not that"),
}


@pytest.mark.parametrize("damage,message", DAMAGE.values(), ids=DAMAGE)
def test_a_checkpoint_that_cannot_be_exported(checkpoint, tmp_path, capsys, damage, message):
    damage(checkpoint)
    error = error_of(capsys, checkpoint, tmp_path / "out")
    assert f"CKPT {checkpoint}: " in error and message in error
    assert list(tmp_path.iterdir()) == [checkpoint]


@pytest.mark.parametrize("content", [[torch.zeros(2)], {"a": 3}, {"a": "print"}], ids=["list", "number", "text"])
def test_a_bin_file_that_holds_no_weights(tmp_path, capsys, content):
    tiny_student().config.save_pretrained(tmp_path / "bin")
    torch.save(content, tmp_path / "bin" / "pytorch_model.bin")
    error = error_of(capsys, tmp_path / "bin", tmp_path / "out")
    assert f"CKPT {tmp_path / 'bin'}: pytorch_model.bin cannot be read as weights" in error


class Command:
    """Unpickled by a loader that trusts it, it runs."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_bin_file_that_runs_code_is_refused(tmp_path, capsys):
    tiny_student().config.save_pretrained(tmp_path / "bin")
    torch.save({"a": Command(tmp_path / "marker")}, tmp_path / "bin" / "pytorch_model.bin")
    assert "pytorch_model.bin cannot be read as weights" in error_of(capsys, tmp_path / "bin", tmp_path / "out")
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["nothing", "file"])
def test_a_checkpoint_that_is_no_directory(tmp_path, capsys, name):
    (tmp_path / "file").touch()
    error = error_of(capsys, tmp_path / name, tmp_path / "out")
    assert f"CKPT {tmp_path / name}: is no directory; expected a checkpoint" in error
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_an_out_that_is_taken(original, tmp_path, capsys):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    for name in ("full", "file", "link"):
        error = error_of(capsys, original, tmp_path / name)
        assert f"OUT {tmp_path / name}: exists and is no empty directory; name another" in error
    assert f"OUT {tmp_path / 'file' / 'out'}: cannot be written" in error_of(
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
    assert f"OUT {tmp_path / 'out'}: cannot be written: [Errno 28] No space" in error_of(
        capsys, original, tmp_path / "out"
    )
    monkeypatch.setattr(os, "fsync", fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt):
        main([str(original), str(tmp_path / "out")])
    assert [len(names) for names in seen] == [1] * 6 and ["out"] not in seen
    assert list(tmp_path.iterdir()) == []


def test_the_command(original, tmp_path, capsys, monkeypatch):
    def run(*words):
        monkeypatch.setattr(sys, "argv", ["export.py", *map(str, words)])
        monkeypatch.delitem(sys.modules, "llamba.export")
        with pytest.raises(SystemExit) as ended:
            runpy.run_module("llamba.export", run_name="__main__")
        monkeypatch.setitem(sys.modules, "llamba.export", export)
        return ended.value.code, *capsys.readouterr()

    code, out, error = run(original, tmp_path / "out")
    assert (code, error) == (0, "") and out.startswith(str(tmp_path / "out"))
    code, out, error = run(original, tmp_path / "out")
    assert (code, out) == (2, "") and error.startswith("error: OUT")
    code, out, error = run("--help")
    assert code == 0 and "CKPT" in out and "OUT" in out and "trust_remote_code" in out
    assert run(original)[0] == 2
