"""An evaluation divided between ranks, killed, stopped and resumed: real processes on the tiny preset. None of it may
change the results.
"""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest

from arguments import parse_eval_args
from evaluation import partial_results
from evaluation.checks import check_inputs
from evaluation.partial_results import Claim, PartialResults, partial_folder, resumable
from evaluation.pieces import Piece, share_out
from tests import eval_runs, fresh
from tests.eval_runs import OPTIONS
from utils import TakenError, lock_dir

ROOT = Path(__file__).parents[1]


def assert_same_results(output: Path, expected: Path) -> None:
    """Asserts that all but the configs is equal; log-likelihoods up to the rounding of other batches and ranks."""
    reports = [json.loads(path.read_text()) for path in (output, expected)]
    log_likelihoods: list[list[float]] = [[], []]
    for report, values in zip(reports, log_likelihoods, strict=True):
        for result in report["models"].values():
            del result["config"]
            for prediction in result["predictions"]:
                values += prediction.pop("log_likelihoods")
    assert reports[0] == reports[1]
    assert log_likelihoods[0] == pytest.approx(log_likelihoods[1], abs=1e-4)


@pytest.fixture(scope="module")
def played(tmp_path_factory) -> Path:
    """Returns the folder in which all evaluations of tests/eval_runs.py have run."""
    folder = tmp_path_factory.mktemp("runs")
    fresh.call(eval_runs.play, folder)
    return folder


def facts_of(played: Path, name: str) -> list[dict]:
    return json.loads((played / "facts.json").read_text())[name]


def test_an_undisturbed_evaluation_leaves_results_report_and_chart(played):
    (run,) = facts_of(played, "straight")
    assert run["codes"] == [0], run["text"]
    assert {path.name for path in (played / "straight").glob("eval*")} == {"eval.json", "eval.md", "eval.png"}


def test_two_ranks_find_what_one_does(played):
    (run,) = facts_of(played, "two")
    assert run["codes"] == [0, 0], run["text"]
    assert_same_results(played / "two" / "eval.json", played / "straight" / "eval.json")
    assert run["text"].count("retrieval: tokens") == 1  # one rank speaks


@pytest.mark.parametrize("name", ["disturbed1", "disturbed2"])
def test_a_killed_and_then_stopped_evaluation_resumes(played, name):
    killed, again, other, stopped, finished = facts_of(played, name)
    assert killed["codes"][0] == -signal.SIGKILL and all(killed["codes"]), killed["text"]
    assert len(killed["pieces"]) >= 3 and not killed["is_done"]
    assert again["codes"] == [2] and "resume it with --resume, or throw them away" in again["text"]
    assert other["codes"] == [2] and "--dtype was float32 and is bfloat16" in other["text"]
    assert stopped["codes"][0] == 75 and "resume with --resume" in stopped["text"], stopped["text"]
    assert set(killed["pieces"]) < set(stopped["pieces"])
    assert finished["codes"] == [0], finished["text"]
    assert finished["pieces"] == [] and not partial_folder(played / name / "eval.json").exists()
    assert_same_results(played / name / "eval.json", played / "straight" / "eval.json")


def options_for(tmp_path: Path, *more: str):
    words = [*OPTIONS, "--output", str(tmp_path / "eval.json"), *more]
    return parse_eval_args(words)


def test_what_is_saved_is_not_measured_again(tmp_path):
    args = options_for(tmp_path)
    inputs = check_inputs(args)
    with (
        pytest.raises(RuntimeError),
        resumable(Path(args.output), inputs.settings, resume=False, overwrite=args.overwrite),
    ):
        PartialResults(partial_folder(Path(args.output))).put("teacher", "mmlu-tools", {"found": 1})
        raise RuntimeError("the power fails")
    found = PartialResults(partial_folder(Path(args.output)))
    assert ("teacher", "mmlu-tools") in found and ("teacher", "mmlu-meals") not in found
    assert check_inputs(options_for(tmp_path, "--resume")).settings == inputs.settings
    with resumable(Path(args.output), inputs.settings, resume=True, overwrite=False):
        assert PartialResults(partial_folder(Path(args.output))).found == {("teacher", "mmlu-tools"): {"found": 1}}


def interrupt(args, inputs, *pieces: str) -> None:
    """Leaves these pieces of the teacher's results behind."""
    with (
        pytest.raises(RuntimeError),
        resumable(Path(args.output), inputs.settings, resume=args.resume, overwrite=args.overwrite),
    ):
        for piece in pieces:
            PartialResults(partial_folder(Path(args.output))).put("teacher", piece, {"found": piece})
        raise RuntimeError("the power fails")


def test_a_damaged_piece_is_named_and_measured_again(tmp_path, caplog):
    args = options_for(tmp_path)
    interrupt(args, check_inputs(args), "mmlu-tools", "mmlu-meals")
    file = partial_folder(Path(args.output)) / "teacher" / "mmlu-tools.json"
    whole = file.read_text()
    for content in (
        '{"fou',
        "[]",
        "null",
        '{"found": NaN}',
        whole.replace('mmlu-tools\\"', 'mmlu-meals\\"'),
        "[" * 100_000,
    ):
        assert content != whole
        file.write_text(content)
        caplog.clear()
        assert list(PartialResults(partial_folder(Path(args.output))).found) == [("teacher", "mmlu-meals")]
        assert "mmlu-tools.json is damaged" in caplog.text
    (partial_folder(Path(args.output)) / "settings.json").write_text("[]")
    with pytest.raises(ValueError, match="--resume: .*settings.json is damaged .*--overwrite"):
        check_inputs(options_for(tmp_path, "--resume"))


def test_a_resumed_evaluation_names_all_models_that_were_measured(tmp_path):
    args = options_for(tmp_path, "--which", "teacher")
    interrupt(args, check_inputs(args), "mmlu-tools")
    with pytest.raises(ValueError, match="--resume: .* also has results of teacher, which --which does not name"):
        check_inputs(options_for(tmp_path, "--resume", "--which", "student"))
    assert check_inputs(options_for(tmp_path, "--resume")).models == ["student", "hybrid", "teacher"]  # more may be


def test_a_half_written_report_does_not_prevent_resuming(tmp_path):
    """An older report does not either, where a run with --overwrite was interrupted."""
    args = options_for(tmp_path)
    interrupt(args, check_inputs(args), "mmlu-tools")
    for name in ("eval.md", "eval.json"):
        (tmp_path / name).touch()
    check_inputs(options_for(tmp_path, "--resume"))
    with pytest.raises(ValueError, match="exists already"):
        check_inputs(options_for(tmp_path))


def test_a_changed_held_out_text_under_the_same_name_is_an_error(tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("One fine day in the woods. " * 40)
    args = options_for(tmp_path, "--held_out", str(text), "--held_out_windows", "2")
    interrupt(args, check_inputs(args), "held_out-0")
    text.write_text("A stormy night at sea, alas. " * 40)
    with pytest.raises(ValueError, match="--resume: .*the held-out text was"):
        check_inputs(options_for(tmp_path, "--held_out", str(text), "--held_out_windows", "2", "--resume"))


def test_what_was_not_measured_may_change(tmp_path):
    words = ["--preset", "tiny", "--output", str(tmp_path / "eval.json"), "--limit", "3"]
    args = parse_eval_args(words)
    interrupt(args, check_inputs(args), "mmlu-tools")
    check_inputs(parse_eval_args([*words, "--resume", "--seed", "3", "--retrieval", "--retrieval_questions", "9"]))
    with pytest.raises(ValueError, match="--limit was 3 and is 4"):
        check_inputs(parse_eval_args([*words[:-1], "4", "--resume"]))


def test_a_full_disk_is_one_error(tmp_path, monkeypatch):
    def full(path, content):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(partial_results, "write_whole", full)
    with pytest.raises(ValueError, match="--output: .*teacher/mmlu-a.json cannot be written .No space .*--resume"):
        PartialResults(tmp_path).put("teacher", "mmlu-a", {})
    with pytest.raises(ValueError, match="--output .*eval.json.partial cannot be written .No space"):
        resumable(tmp_path / "eval.json", {}, resume=False, overwrite=False).__enter__()


@pytest.mark.parametrize("name", ["mmlu-../../../x", "mmlu-a/b", "mmlu-" + "x" * 400, "mmlu-.\n\0", "mmlu-\ud800 é"])
def test_a_piece_of_any_name_is_a_file_of_its_own_in_the_folder(tmp_path, name):
    PartialResults(tmp_path).put("teacher", name, {"found": 1})
    PartialResults(tmp_path).put("teacher", f"{name}2", {"found": 2})
    assert len(list((tmp_path / "teacher").iterdir())) == 2 and len(list(tmp_path.iterdir())) == 1
    assert PartialResults(tmp_path).found == {("teacher", name): {"found": 1}, ("teacher", f"{name}2"): {"found": 2}}


@pytest.mark.parametrize("first", ["main", "other"])
def test_a_folder_that_is_removed_meanwhile_is_made_again_with_all_results(tmp_path, caplog, first):
    """Two ranks: whichever writes first, each restores its own."""
    args = options_for(tmp_path)
    inputs, folder = check_inputs(args), partial_folder(Path(args.output))
    preparing = resumable(Path(args.output), inputs.settings, resume=False, overwrite=False)
    with pytest.raises(RuntimeError), preparing as claim:
        ranks = {"main": PartialResults(folder, claim), "other": PartialResults(folder)}
        for name, rank in ranks.items():
            rank.put("teacher", f"mmlu-{name}", 1)
        shutil.rmtree(folder)
        for name in (first, *(set(ranks) - {first})):
            ranks[name].put("teacher", f"mmlu-{name}-again", 2)
        with pytest.raises(ValueError, match="another run is writing there"):
            Claim(Path(args.output))
        raise RuntimeError("the power fails")
    assert "was removed: it is made again" in caplog.text
    assert check_inputs(options_for(tmp_path, "--resume")).settings == inputs.settings
    assert {piece for _, piece in PartialResults(folder).found} == {
        *("mmlu-main", "mmlu-other", "mmlu-main-again", "mmlu-other-again")
    }


def test_an_evaluation_whose_folder_another_has_taken_ends_and_leaves_it_alone(tmp_path, caplog):
    output = tmp_path / "eval.json"
    folder = partial_folder(output)
    with pytest.raises(TakenError), resumable(output, {"a": 1}, resume=False, overwrite=False) as claim:
        main, other = PartialResults(folder, claim), PartialResults(folder)
        shutil.rmtree(folder)
        with resumable(output, {"a": 2}, resume=False, overwrite=False):
            for rank, words in ((main, "another run is writing there"), (other, "is now of another evaluation")):
                with pytest.raises(TakenError, match=words):
                    rank.put("teacher", "mmlu-tools", 1)
            with pytest.raises(TakenError):
                main.check_own()
            assert not list(folder.glob("*/*"))
        output.write_text("another's")
        main.check_own()
    assert "resume with" not in caplog.text and output.read_text() == "another's"


def test_a_folder_that_is_gone_at_the_end_is_no_error(tmp_path):
    with resumable(tmp_path / "eval.json", {}, resume=False, overwrite=False) as claim:
        shutil.rmtree(tmp_path / "eval.json.partial")
        PartialResults(tmp_path / "eval.json.partial", claim).check_own()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_another_evaluation_is_not_removed_at_the_end(tmp_path):
    """It has come after the last look."""
    output = tmp_path / "eval.json"
    with resumable(output, {}, resume=False, overwrite=False):
        shutil.rmtree(partial_folder(output))
        later = Claim(output)
    assert later.is_held()


@pytest.mark.parametrize("name", ["--dtype", "--max_length", "teacher", "student"])
def test_settings_that_say_too_little_are_damaged(tmp_path, name):
    args = options_for(tmp_path)
    interrupt(args, check_inputs(args), "mmlu-tools")
    PartialResults(partial_folder(Path(args.output))).put("student", "mmlu-tools", 1)
    file = partial_folder(Path(args.output)) / "settings.json"
    settings = json.loads(file.read_text())
    del settings[name]
    file.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"--resume: .*settings.json is damaged .*does not say {name}"):
        check_inputs(options_for(tmp_path, "--resume"))


def test_what_another_evaluation_has_written_since_the_checks_stays(tmp_path):
    """Two that begin at the same time both pass the checks; the slower one may get the lock after the other's end."""
    output = tmp_path / "eval.json"
    output.write_text("another's")
    with (
        pytest.raises(ValueError, match="--output .*eval.json exists already"),
        resumable(output, {}, resume=False, overwrite=False),
    ):
        raise AssertionError("it must not begin")
    assert not partial_folder(output).exists()
    output.unlink()
    with pytest.raises(RuntimeError), resumable(output, {}, resume=False, overwrite=False):
        PartialResults(partial_folder(output)).put("teacher", "mmlu-tools", 1)
        raise RuntimeError("the power fails")
    with (
        pytest.raises(ValueError, match="resume it with --resume, or throw"),
        resumable(output, {}, resume=False, overwrite=False),
    ):
        raise AssertionError("it must not begin")
    assert PartialResults(partial_folder(output)).found == {("teacher", "mmlu-tools"): 1}


def test_a_lock_whose_folder_the_other_evaluation_removed_is_no_lock(tmp_path, monkeypatch):
    def lock_and_lose(flag, folder):
        lock = lock_dir(flag, folder)
        shutil.rmtree(folder)
        return lock

    monkeypatch.setattr(partial_results, "lock_dir", lock_and_lose)
    with pytest.raises(ValueError, match="another evaluation has just ended"):
        resumable(tmp_path / "eval.json", {}, resume=False, overwrite=False).__enter__()


def test_overwriting_removes_partial_results(tmp_path):
    args = options_for(tmp_path, "--overwrite")
    inputs = check_inputs(args)
    with (
        pytest.raises(RuntimeError),
        resumable(Path(args.output), inputs.settings, resume=False, overwrite=args.overwrite),
    ):
        PartialResults(partial_folder(Path(args.output))).put("teacher", "mmlu-tools", {"found": 1})
        raise RuntimeError("the power fails")
    check_inputs(args)
    with resumable(Path(args.output), inputs.settings, resume=args.resume, overwrite=args.overwrite):
        assert PartialResults(partial_folder(Path(args.output))).found == {}


def test_a_model_that_was_written_again_is_another(tmp_path):
    student = tmp_path / "student"
    shutil.copytree(ROOT / "presets" / "tiny" / "student", student)
    args = options_for(tmp_path, "--student_model", str(student))
    with (
        pytest.raises(RuntimeError),
        resumable(Path(args.output), check_inputs(args).settings, resume=False, overwrite=False),
    ):
        raise RuntimeError("the power fails")
    check_inputs(options_for(tmp_path, "--student_model", str(student), "--resume"))
    time.sleep(0.01)
    os.utime(student / "model.safetensors")
    with pytest.raises(ValueError, match="--resume: .*the student is another model, or was written anew"):
        check_inputs(options_for(tmp_path, "--student_model", str(student), "--resume"))


def test_two_evaluations_do_not_write_to_one_place(tmp_path):
    args = options_for(tmp_path)
    second = resumable(Path(args.output), {}, resume=True, overwrite=False)
    with (
        resumable(Path(args.output), {}, resume=False, overwrite=False),
        pytest.raises(ValueError, match="another run is writing there"),
    ):
        second.__enter__()


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_every_piece_is_done_by_one_rank_and_none_has_much_more(world_size):
    costs = [50, 3, 9, 30, 1, 1, 22, 40, 7, 7]
    pieces = [Piece(f"mmlu-{i}", cost, lambda scorer: None) for i, cost in enumerate(costs)]
    shares = [share_out(pieces, rank, world_size) for rank in range(world_size)]
    assert sorted(piece.name for share in shares for piece in share) == sorted(piece.name for piece in pieces)
    loads = [sum(piece.cost for piece in share) for share in shares]
    assert max(loads) <= max(50, 1.25 * sum(costs) / world_size)
