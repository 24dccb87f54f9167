"""Evaluations on real processes: undisturbed, on two ranks, killed, stopped and gone on with. test_eval_resume.py looks
at what they leave.
"""

import json
import os
import signal
from pathlib import Path

import eval_mmlu_hybrid
from evaluation.partial_results import PartialResults, partial_folder
from tests.faults.traps import trap
from tests.launch import Launch

ROOT = Path(__file__).parents[1]
HELD_OUT = ROOT / "presets" / "tiny" / "text" / "heldout.jsonl"
OPTIONS = [
    *["--preset", "tiny", "--which", "student", "hybrid", "teacher", "--limit", "6", "--num_fewshot", "1"],
    *["--retrieval", "--retrieval_lengths", "120", "--retrieval_pairs", "2", "4", "--retrieval_questions", "8"],
    *["--held_out", str(HELD_OUT), "--held_out_windows", "10", "--held_out_seq_length", "64"],
]


def evaluate(argv: list[str], folder: Path, n_ranks: int = 1, n: int = 0, number: int = 0) -> dict:
    """Exit codes of the ranks, what they said, and which pieces there are after them. With `n`, rank 0 sends itself the
    signal `number` when its n-th piece is done and not yet kept.
    """

    def arm(rank: int) -> None:
        if rank == 0 and n:
            trap(PartialResults, "put", n, lambda: os.kill(os.getpid(), number))

    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    launch = Launch([*argv, "--output", str(folder / "eval.json")], n_ranks, log, arm, eval_mmlu_hybrid.main)
    codes = launch.wait()
    pieces = sorted(str(path) for path in partial_folder(folder / "eval.json").glob("*/*.json"))
    return {"codes": codes, "text": launch.text(), "pieces": pieces, "is_done": (folder / "eval.json").exists()}


def disturbed(folder: Path, n_ranks: int) -> list[dict]:
    """Killed in the fourth piece; started again without a word, and with another option; gone on with and stopped; gone
    on with by one rank.
    """
    going_on = [*OPTIONS, "--resume"]
    return [
        evaluate(OPTIONS, folder, n_ranks, 4, signal.SIGKILL),
        evaluate(OPTIONS, folder),
        evaluate([*going_on, "--dtype", "bfloat16"], folder),
        evaluate(going_on, folder, n_ranks, 3, signal.SIGTERM),
        evaluate(going_on, folder),
    ]


def play(root: Path) -> None:
    for name in ("straight", "two", "disturbed1", "disturbed2"):
        (root / name).mkdir()
    facts = {
        "straight": [evaluate(OPTIONS, root / "straight")],
        "two": [evaluate(OPTIONS, root / "two", n_ranks=2)],
        "disturbed1": disturbed(root / "disturbed1", 1),
        "disturbed2": disturbed(root / "disturbed2", 2),
    }
    (root / "facts.json").write_text(json.dumps(facts))
