"""Every command that the README shows, run as it stands there but for the tiny preset and fewer steps and ranks, in the
order of the README and in one folder. The Chinese README has the same commands (test_readme.py). What needs a
network, or is not for a test to do, is skipped and says why.
"""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import doctor
import eval_mmlu_hybrid
import report
import train_gpus
from tests import fresh
from tests.project.test_readme import ENGLISH, ROOT, commands, read

TINY = ROOT / "presets" / "tiny"
COMMANDS = list(commands(read(ENGLISH)))
BIN = Path(sys.executable).parent

MAINS = {module.__name__ + ".py": module.main for module in (train_gpus, eval_mmlu_hybrid, doctor, report)}

# Appended, and so before what the command says of the same.
TRAIN = "--preset tiny --layers 1 2 3 --dtype float32 --max_steps 2 --seq_length 32 --batch_size 1 --save_interval 0"
TRAIN += " --grad_accumulation_steps 1 --eval_windows 2"
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
    "make": "it is what runs these tests, installs for them, or takes hours",
    "source": "the tests have an environment",
    "pkill": "it would signal the runs of other tests; tests/test_faults.py sends SIGUSR1 to its own",
    "hf auth": "needs a network and an account",
    "hf download": "needs a network",
    "python -c import datasets": "needs a network",
    "wandb sync": "needs a network; tests/monitoring/test_trackers.py reads what it would send",
    "python3 -m pip": "needs a network",
    "PIP_NO_INDEX=1": "needs the wheels of the command before it",
    "python3 -m venv": "`make setup` does so",
    ".venv/bin/pip install": "needs a network, and a driver to choose by",
}


def why_not(words):
    line = " ".join(words)
    return next((why for start, why in NOT_HERE.items() if line.startswith(start)), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the commands run, with the files that the README supposes."""
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
    ours = {
        "OMP_NUM_THREADS": "1",
        "HF_HOME": str(folder / "cache"),
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    return ours | {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}


def start(line, folder):
    environment = {**os.environ, **environment_of(folder)}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(line, cwd=folder, env=environment, **pipes)


def told(process, code=0):
    """What a command printed; it has to end with that exit code."""
    printed, _ = process.communicate(timeout=280)
    assert process.returncode == code, printed[-5000:]
    return printed


def forked(command, folder):
    """The same of an entry of ours, in a fork of a process that has imported everything; torchrun's one rank too."""
    (i,) = (i for i, word in enumerate(command) if Path(word).name in MAINS)
    main, environment = MAINS[Path(command[i]).name], environment_of(folder)
    if "torchrun" in command:
        (code,), printed = fresh.ranks(command[i + 1 :], 1, main, **environment)
    else:
        code, printed = fresh.script(command[i + 1 :], main, **environment)
    assert code == 0, printed[-5000:]
    return printed


def small(words, index):
    """The command on the tiny preset. A run that neither is the first nor goes on has a directory of its own."""
    line = " ".join(words)
    if "train_gpus.py" in line:
        line += f" {TRAIN}" if "colocated" in line else f" {TRAIN} --teacher_device cpu"
    if "doctor.py" in line:
        line += f" {TRAIN}"
    if "eval_mmlu_hybrid.py" in line:
        line += f" {EVALUATE}"
    if not any(part in line for part in ("production", "--resume auto", "args.yaml")):
        line = re.sub(r"--output_dir DIR\S*", f"--output_dir OF-{index}", line)
    for old, new in SMALLER:
        line = re.sub(old, new, line)
    return shlex.split(line)


def test_every_reason_is_needed():
    lines = [" ".join(words) for words in COMMANDS]
    assert [start for start in NOT_HERE if not any(line.startswith(start) for line in lines)] == []


@pytest.mark.parametrize("index", range(len(COMMANDS)), ids=lambda i: " ".join(COMMANDS[i])[:60])
def test_a_command_of_the_readme(folder, index, monkeypatch):
    words = COMMANDS[index]
    if reason := why_not(words):
        pytest.skip(reason)
    if words[1] in ("-c", "-m"):  # what is exported and loaded must need nothing of this process
        assert told(start(words, folder)).strip()
        return
    command = small(words, index)
    monkeypatch.chdir(folder)
    if "--nnodes=2" in command:
        two_nodes(command, folder)
    elif any("bench_gpu" in word for word in command):
        assert "GPU" in told(start(command, folder), code=2)
    else:
        printed = (
            told(start(command, folder)) if "nohup" in command or command[0] == "tail" else forked(command, folder)
        )
        if "--dry_run" in words:
            assert "rank 0" in printed and "fits" in printed
        elif any("train_gpus.py" in word for word in words):
            assert_trained(folder / command[len(command) - 1 - command[::-1].index("--output_dir") + 1])


def two_nodes(command, folder):
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    line = " ".join(command).replace("HOST", "127.0.0.1").replace("29543", str(port))
    nodes = [start(shlex.split(line.replace("--node_rank=0", f"--node_rank={node}")), folder) for node in (0, 1)]
    assert "complete: 2 of 2" in [told(node) for node in nodes][0]


def assert_trained(output_dir):
    steps = [json.loads(line)["step"] for line in (output_dir / "metrics.jsonl").read_text().splitlines()]
    assert steps[-1] == 2 and (output_dir / "latest" / "model.safetensors").is_file()
    assert (output_dir / "args.yaml").is_file()


def test_what_the_commands_have_left(folder):
    """All that the README says a command leaves."""
    scores = json.loads((folder / "DIR" / "eval.json").read_text())
    assert {"teacher", "student", "hybrid", "hybrid_ft", "n"} <= scores.keys()
    for name in ("DIR/eval.md", "DIR/eval.png", "DIR/beyond.json", "runs/before.json", "DIR/report/index.html"):
        assert (folder / name).is_file(), name
    for name in ("comparison.html", "runs/my-hybrid/config.json", "DIR-2/metrics.jsonl"):
        assert (folder / name).is_file(), name
    assert len(list((folder / "DIR" / "wandb").glob("offline-run-*"))) == 1
