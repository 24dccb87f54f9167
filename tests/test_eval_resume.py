"""An evaluation shared out over ranks, killed, stopped and gone on with: real processes on the tiny preset, whose
results must not depend on any of it.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

import eval_mmlu_hybrid
from arguments import parse_eval_args
from eval_pieces import Piece, share_out
from eval_plan import check
from partial_results import PartialResults, kept_in, partial_folder
from tests.faults.launch import Launch
from tests.faults.traps import trap

ROOT = Path(__file__).parents[1]
HELD_OUT = ROOT / "presets" / "tiny" / "text" / "heldout.jsonl"
OPTIONS = [
    *[
        "--preset",
        "tiny",
        "--which",
        "student",
        "hybrid",
        "teacher",
        "--limit",
        "6",
        "--num_fewshot",
        "1",
        "--retrieval",
    ],
    *["--retrieval_lengths", "120", "--retrieval_pairs", "2", "4", "--retrieval_questions", "8"],
    *["--held_out_windows", "10", "--held_out_seq_length", "64"],
    *["--held_out", str(HELD_OUT)],
]


def evaluate(argv: list[str], folder: Path, n_ranks: int = 1, n: int = 0, number: int = 0) -> tuple[list[int], str]:
    """Exit codes of the ranks, and what they said. With `n`, rank 0 sends itself the signal `number` when its n-th
    piece is done and not yet kept.
    """

    def arm(rank: int) -> None:
        if rank == 0 and n:
            trap(PartialResults, "put", n, lambda: os.kill(os.getpid(), number))

    log = folder / f"log-{len(list(folder.glob('log-*')))}"
    launch = Launch([*argv, "--output", str(folder / "eval.json")], n_ranks, log, arm, eval_mmlu_hybrid.main)
    return launch.wait(), launch.text()


def results(output: Path) -> dict:
    """All figures, without how they were come by; log-likelihoods to what batches and ranks leave of them."""
    report = json.loads(output.read_text())
    for result in report["models"].values():
        del result["config"]
        for prediction in result["predictions"]:
            prediction["log_likelihoods"] = [round(value, 3) for value in prediction["log_likelihoods"]]
    return report


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    codes, text = evaluate(OPTIONS, folder)
    assert codes == [0], text
    return folder / "eval.json"


def test_two_ranks_find_what_one_does(straight, tmp_path):
    codes, text = evaluate(OPTIONS, tmp_path, n_ranks=2)
    assert codes == [0, 0], text
    assert results(tmp_path / "eval.json") == results(straight)
    assert text.count("retrieval: tokens") == 1  # one rank speaks
    assert {path.name for path in tmp_path.glob("eval*")} == {"eval.json", "eval.md", "eval.png"}


@pytest.mark.parametrize("n_ranks", [1, 2])
def test_a_killed_and_then_stopped_evaluation_goes_on(straight, tmp_path, n_ranks):
    output = tmp_path / "eval.json"
    codes, _ = evaluate(OPTIONS, tmp_path, n_ranks, 4, signal.SIGKILL)
    assert codes[0] == -signal.SIGKILL and all(codes)
    pieces = set(partial_folder(output).glob("*/*.json"))
    assert len(pieces) >= 3 and not output.exists()
    codes, text = evaluate(OPTIONS, tmp_path)
    assert codes == [2] and "go on with --resume, or throw them away" in text
    codes, text = evaluate([*OPTIONS, "--resume", "--dtype", "bfloat16"], tmp_path)
    assert codes == [2] and "--dtype was float32 and is bfloat16" in text

    codes, text = evaluate([*OPTIONS, "--resume"], tmp_path, n_ranks, 3, signal.SIGTERM)
    assert codes[0] == 75 and "go on with --resume" in text, text
    assert pieces < set(partial_folder(output).glob("*/*.json"))
    codes, text = evaluate([*OPTIONS, "--resume"], tmp_path)  # on another number of ranks
    assert codes == [0], text
    assert results(output) == results(straight)
    assert not partial_folder(output).exists()


def options_for(tmp_path: Path, *more: str):
    words = [*OPTIONS, "--output", str(tmp_path / "eval.json"), *more]
    return parse_eval_args(words)


def test_what_is_there_is_not_done_again(tmp_path):
    args = options_for(tmp_path)
    plan = check(args)
    with pytest.raises(RuntimeError), kept_in(Path(args.output), plan.settings, resume=False):
        PartialResults(partial_folder(Path(args.output))).put("teacher", "mmlu-tools", {"found": 1})
        raise RuntimeError("the power fails")
    found = PartialResults(partial_folder(Path(args.output)))
    assert ("teacher", "mmlu-tools") in found and ("teacher", "mmlu-meals") not in found
    assert check(options_for(tmp_path, "--resume")).settings == plan.settings  # it may go on
    with kept_in(Path(args.output), plan.settings, resume=True):
        assert PartialResults(partial_folder(Path(args.output))).found == {("teacher", "mmlu-tools"): {"found": 1}}


def test_overwriting_forgets(tmp_path):
    args = options_for(tmp_path, "--overwrite")
    plan = check(args)
    with pytest.raises(RuntimeError), kept_in(Path(args.output), plan.settings, resume=False):
        PartialResults(partial_folder(Path(args.output))).put("teacher", "mmlu-tools", {"found": 1})
        raise RuntimeError("the power fails")
    check(args)
    with kept_in(Path(args.output), plan.settings, args.resume):
        assert PartialResults(partial_folder(Path(args.output))).found == {}


def test_a_model_that_was_written_anew_is_another(tmp_path):
    student = tmp_path / "student"
    shutil.copytree(ROOT / "presets" / "tiny" / "student", student)
    args = options_for(tmp_path, "--student_model", str(student))
    with pytest.raises(RuntimeError), kept_in(Path(args.output), check(args).settings, resume=False):
        raise RuntimeError("the power fails")
    check(options_for(tmp_path, "--student_model", str(student), "--resume"))
    time.sleep(0.01)
    os.utime(student / "model.safetensors")
    with pytest.raises(ValueError, match="--resume: .*the student is another model, or was written anew"):
        check(options_for(tmp_path, "--student_model", str(student), "--resume"))


def test_two_evaluations_do_not_write_to_one_place(tmp_path):
    args = options_for(tmp_path)
    second = kept_in(Path(args.output), {}, resume=True)
    with kept_in(Path(args.output), {}, resume=False), pytest.raises(ValueError, match="another run is writing there"):
        second.__enter__()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_piece_is_done_by_one_rank_and_none_has_much_more(world_size):
    costs = [50, 3, 9, 30, 1, 1, 22, 40, 7, 7]
    pieces = [Piece(f"mmlu-{i}", cost, lambda scorer: None) for i, cost in enumerate(costs)]
    shares = [share_out(pieces, rank, world_size) for rank in range(world_size)]
    assert sorted(piece.name for share in shares for piece in share) == sorted(piece.name for piece in pieces)
    loads = [sum(piece.cost for piece in share) for share in shares]
    assert max(loads) <= max(50, 1.25 * sum(costs) / world_size)
