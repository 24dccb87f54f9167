"""Runs evaluations in real processes: undisturbed, on two ranks, killed, stopped and resumed. test_eval_resume.py looks
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


def evaluate(argv: list[str], folder: Path, n_ranks: int = 1, n: int = 0, signal_number: int = 0) -> dict:
    """Returns the ranks' exit codes, what they printed, and which pieces are saved afterwards. With `n`, rank 0 sends
    itself the signal `signal_number` when its n-th piece is measured and not yet saved.
    """

    def arm(rank: int) -> None:
        if rank == 0 and n:
            trap(PartialResults, "put", n, lambda: os.kill(os.getpid(), signal_number))

    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    launch = Launch([*argv, "--output", str(folder / "eval.json")], n_ranks, log, arm, eval_mmlu_hybrid.main)
    codes = launch.wait()
    pieces = sorted(str(path) for path in partial_folder(folder / "eval.json").glob("*/*.json"))
    return {"codes": codes, "text": launch.text(), "pieces": pieces, "is_done": (folder / "eval.json").exists()}


def disturbed(folder: Path, n_ranks: int) -> list[dict]:
    """Runs an evaluation that is killed in the fourth piece; started again without --resume; resumed with another
    option; resumed and stopped; resumed by one rank.
    """
    resuming = [*OPTIONS, "--resume"]
    return [
        evaluate(OPTIONS, folder, n_ranks, 4, signal.SIGKILL),
        evaluate(OPTIONS, folder),
        evaluate([*resuming, "--dtype", "bfloat16"], folder),
        evaluate(resuming, folder, n_ranks, 3, signal.SIGTERM),
        evaluate(resuming, folder),
    ]


def play(root: Path) -> None:
    """Runs all of them in folders of `root`, and saves what `evaluate` returned in facts.json."""
    for name in ("straight", "two", "disturbed1", "disturbed2"):
        (root / name).mkdir()
    facts = {
        "straight": [evaluate(OPTIONS, root / "straight")],
        "two": [evaluate(OPTIONS, root / "two", n_ranks=2)],
        "disturbed1": disturbed(root / "disturbed1", 1),
        "disturbed2": disturbed(root / "disturbed2", 2),
    }
    (root / "facts.json").write_text(json.dumps(facts))
