"""`python -m llamba.export`: an export loads and runs in a fresh process without this repository, and gives the same
logits bit for bit; it can be trained as a student and exported again; its card says what it is.
"""

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
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from llamba import LlambaForCausalLM, card, export
from llamba.export import main
from model_utils import get_configs, get_student_model, get_tokenizer, locate_model
from tests.llamba.exports import ROOT, RUN, TEACHER, VOCAB, WEIGHTS, save_checkpoint
from tests.tiny import tiny_hybrid, tiny_student, tokens

CODE = {"block.py", "cache.py", "configuration.py", "elementwise.py", "families.py", "kept_heads.py", "kernels.py"}
CODE |= {"llama.py", "mamba_scan.py", "mixer.py", "modeling.py", "ssd.py"}
TOKENIZER = {"tokenizer.json", "tokenizer_config.json"}
HEADS = {"my-hybrid.v1": {}, "half": {0: [1], 2: [0, 2, 3]}}  # kept beside the whole layers
KERNEL_CHOICE = ("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA")  # logits are bitwise equal with the same kernels only


@pytest.fixture(scope="module")
def hybrid():
    return tiny_hybrid(vocab_size=VOCAB)


@pytest.fixture(scope="module")
def original(hybrid, tmp_path_factory):
    return save_checkpoint(tmp_path_factory.mktemp("run"), hybrid, world_size=2)


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
    """Loads a float32 hybrid in shards and a bfloat16 one, by heads too, in one file, as a user without this repository
    does.
    """
    folder = tmp_path_factory.mktemp("fresh")
    half = save_checkpoint(
        folder / "run", tiny_hybrid(torch.bfloat16, heads=HEADS["half"], vocab_size=VOCAB), world_size=1
    )
    assert main([str(half), str(folder / "half")]) == 0
    script = folder / "script.py"
    script.write_text(textwrap.dedent(FRESH))
    env = {"PATH": os.environ["PATH"], "HOME": str(folder), "HF_MODULES_CACHE": str(folder / "modules")}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    env |= {name: os.environ[name] for name in KERNEL_CHOICE if name in os.environ}
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
    model = tiny_hybrid(dtype, heads=HEADS[name], vocab_size=VOCAB)
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
    """Checkpoints' weights are readable by their owner alone; an export follows the umask."""
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


def test_the_card_says_what_the_model_is_and_how_it_was_made(exported, hybrid):
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


def test_the_card_says_which_heads_are_beside_mixers(fresh):
    _, body = parts_of_card(fresh / "half")
    assert "0 of its 4 layers are Mamba-2 mixers" in body
    assert "2 have some of a Llama's attention heads beside a mixer of the others" in body
    assert "| attention heads beside mixers | 0:1, 2:0, 2:2, 2:3 |" in body
    assert "| heads from the teacher | none |" in body  # of the options of its run


def test_the_card_of_an_alignment_says_what_was_trained(hybrid, tmp_path):
    aligned = [*RUN, "--stage", "align", "--max_lr", "0.001", "--copied_lr_factor", "0.1"]
    folder = save_checkpoint(tmp_path / "run", hybrid, 1, aligned)
    assert main([str(folder), str(tmp_path / "out")]) == 0
    _, body = parts_of_card(tmp_path / "out")
    assert "Aligned with a teacher, and not distilled" in body
    assert "| learning rate | 0.001 |" in body and "| frozen | all but the mixers |" in body
    assert "Distilled from" not in body and "weight |" not in body and "temperature" not in body
    assert "| layers from the teacher | 1 3 |" in body


def test_the_card_knows_nothing_of_a_run_that_left_no_state(tmp_path):
    tiny_student().save_pretrained(tmp_path / "plain")
    assert main([str(tmp_path / "plain"), str(tmp_path / "out")]) == 0
    front, body = parts_of_card(tmp_path / "out")
    assert "base_model" not in front and "datasets" not in front
    assert "How it was made" not in body
    assert "All 4 layers are Mamba-2 mixers" in body


def test_no_path_of_this_machine_is_named(hybrid, tmp_path, monkeypatch):
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


# --- the command ----------------------------------------------------------------------------------------------


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
