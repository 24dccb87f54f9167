"""Commands of the README and of docs/, run as they are there but for the tiny preset and fewer steps and ranks, in that
order and in one folder. The Chinese README has the same commands (test_readme.py). What needs a network, or is not for
a test to do, is skipped and says why.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import doctor
import eval_mmlu_hybrid
import report
import train_gpus
from llamba import export
from tests import fresh
from tests.project.markdown import ENGLISH, ROOT, commands, read
from tests.small_runs import read_metrics

TINY = ROOT / "presets" / "tiny"
PAGES = (ENGLISH, *(f"docs/{page}.md" for page in ("evaluation", "reliability", "logs", "data")))
BIN = Path(sys.executable).parent
MAINS = {module.__name__ + ".py": module.main for module in (train_gpus, eval_mmlu_hybrid, doctor, report)}

# Appended, and so before what the command says of the same.
TRAIN = "--preset tiny --layers 1 2 3 --dtype float32 --max_steps 2 --seq_length 32 --batch_size 1 --save_interval 0"
TRAIN += " --grad_accumulation_steps 1 --eval_windows 2 --teacher_device cpu"
EVALUATE = "--preset tiny --limit 2 --num_fewshot 0 --held_out_windows 2 --held_out_seq_length 32 --batch_size 2"
EVALUATE += " --retrieval_lengths 64 --retrieval_pairs 4 --retrieval_questions 2 --dtype float32 --layers 1 2 3"

SMALLER = (
    (r"--nproc_per_node[= ]\d+", "--nproc_per_node=1"),
    (r"(^| )((benchmarks/)?\w+\.py)", rf"\1{ROOT}/\2"),
    (r"DIR/checkpoint-\d+", "DIR/latest"),
    (r"--resume_step \d+", "--resume_step 1"),
    (r"--subjects philosophy marketing", "--subjects animals meals"),
    (r"--tasks \S+", ""),  # their data would have to be there; tests/evaluation/test_lm_eval.py runs tasks
    (r"tail -f", "tail"),
)

# By how a command begins: why it is not run here.
NOT_HERE = {
    "make demo": "tests/test_demo.py runs it",
    "make test": "it is what runs these tests",
    "source": "the tests have an environment",
    "kill": "no run is under way here; tests/test_faults.py signals its own",
    "hf auth": "needs a network and an account",
    "hf download": "needs a network",
    "python -c import datasets": "needs a network",
    "wandb sync": "needs a network; tests/monitoring/test_trackers.py reads what it would send",
}


def shown():
    """Returns (page, words) of each command, once."""
    seen = set()
    for page in PAGES:
        for words in commands(read(page)):
            if " ".join(words) not in seen:
                seen.add(" ".join(words))
                yield page, words


COMMANDS = list(shown())


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Returns the folder in which the commands run, with the files that the README supposes."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "configs").symlink_to(ROOT / "configs")
    (folder / "data").mkdir()
    (folder / "data" / "mmlu").symlink_to(TINY / "mmlu")
    (folder / "fineweb-edu").mkdir()
    shutil.copy(TINY / "text" / "train.jsonl", folder / "fineweb-edu")
    shutil.copy(TINY / "text" / "english.txt", folder / "held-out.txt")
    (folder / "NAME.log").write_text("")
    return folder


def environment_of(folder):
    ours = {"OMP_NUM_THREADS": "1", "HF_HOME": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
    return ours | {"PYTHONPATH": str(ROOT), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def run_whole(command, folder):
    """Runs a command in its own process, as a shell does, and returns what it printed."""
    environment = {**os.environ, **environment_of(folder)}
    ended = subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=280
    )
    assert ended.returncode == 0, ended.stdout[-5000:]
    return ended.stdout


def run_forked(command, folder):
    """Runs a program of ours, or the one rank of a torchrun, in a fork of a process that has imported everything."""
    environment = environment_of(folder)
    if command[1:2] == ["-m"]:
        code, printed = fresh.script(command[3:], export.main, **environment)
    elif command[1:2] == ["-c"]:
        code, printed = fresh.script(command[2:], run_code, **environment)
    else:
        (i,) = (i for i, word in enumerate(command) if Path(word).name in MAINS)
        main = MAINS[Path(command[i]).name]
        if "torchrun" in command:
            (code,), printed = fresh.ranks(command[i + 1 :], 1, main, **environment)
        else:
            code, printed = fresh.script(command[i + 1 :], main, **environment)
    assert not code, printed[-5000:]
    return printed


def run_code():
    exec(sys.argv[1], {})


def small(words, index):
    """Returns the command for the tiny preset. A run that is neither the first nor resumed has its own directory."""
    line = " ".join(words)
    if "train_gpus.py" in line or "doctor.py" in line:
        line += f" {TRAIN}"
    if "eval_mmlu_hybrid.py" in line:
        line += f" {EVALUATE}"
    if not any(part in line for part in ("production", "--resume auto", "args.yaml")):
        line = re.sub(r"--output_dir DIR\S*", f"--output_dir OF-{index}", line)
    for old, new in SMALLER:
        line = re.sub(old, new, line)
    return shlex.split(line)


def test_every_reason_is_needed():
    lines = [" ".join(words) for _, words in COMMANDS]
    assert [start for start in NOT_HERE if not any(line.startswith(start) for line in lines)] == []


def reason_to_skip(words):
    line = " ".join(words)
    return next((why for start, why in NOT_HERE.items() if line.startswith(start)), None)


@pytest.fixture(scope="module")
def played(folder):
    """Runs all commands in their order, for later ones need what earlier ones leave. Returns the errors by index."""
    errors = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for index, (_, words) in enumerate(COMMANDS):
            if reason_to_skip(words) is None:
                try:
                    play(folder, index, words)
                except (AssertionError, OSError) as error:
                    errors[index] = error
    return errors


def play(folder, index, words):
    command = words if words[1] in ("-c", "-m") else small(words, index)
    printed = (run_whole if words[0] == "tail" else run_forked)(command, folder)
    if "--dry_run" in words:
        assert "rank 0" in printed and "fits" in printed
    elif "train_gpus.py" in words:
        assert_trained(folder / command[len(command) - 1 - command[::-1].index("--output_dir") + 1])
    elif words[0] == "python":
        assert printed.strip()


def assert_trained(output_dir):
    steps = [row["step"] for row in read_metrics(output_dir)]
    assert steps[-1] == 2 and (output_dir / "latest" / "model.safetensors").is_file()
    assert (output_dir / "args.yaml").is_file()


@pytest.mark.timeout(600)  # for the first of them, on a busy machine: it plays all
@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=lambda i: " ".join(COMMANDS[i][1])[:60])
def test_a_command(played, index):
    if reason := reason_to_skip(COMMANDS[index][1]):
        pytest.skip(reason)
    if index in played:
        raise played[index]


@pytest.mark.timeout(600)
def test_what_the_commands_have_left(folder, played):
    """All that README and docs say a command leaves."""
    scores = json.loads((folder / "DIR" / "eval.json").read_text())
    assert {"teacher", "student", "hybrid", "hybrid_ft", "n"} <= scores.keys()
    for name in ("DIR/eval.md", "DIR/eval.png", "DIR/beyond.json", "runs/before.json", "DIR/report/index.html"):
        assert (folder / name).is_file(), name
    for name in ("comparison.html", "runs/my-hybrid/config.json", "DIR-2/metrics.jsonl"):
        assert (folder / name).is_file(), name
    assert len(list((folder / "DIR" / "wandb").glob("offline-run-*"))) == 1
