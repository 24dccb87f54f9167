"""Evaluation during training: its figures against plain computations from the checkpoint, and that it leaves the run as
it would be without. The real runs are played by tests/monitoring/evaluator_runs.py.
"""

import json
import math
import re

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer

from arguments import parse_train_args
from distillation.losses import compute_distill_loss
from distillation.objective import DistillationModel
from distillation.teacher import NoTeacher
from evaluation.held_out import read_windows
from evaluation.mmlu import build_questions, score
from evaluation.mmlu_files import load_mmlu
from llamba import LlambaForCausalLM
from monitoring.evaluator import Evaluator, Material, read_material, share_of_windows
from monitoring.run_log import RunLog, format_evaluation
from processes.exits import StopRequest
from processes.ranks import process_groups
from tests import fresh
from tests.faults.compare import differences, rows, tensors
from tests.monitoring import evaluator_runs
from tests.monitoring.evaluator_runs import TINY
from tests.small_runs import read_metrics
from tests.tiny import tiny_student
from text.sources import TextSource

TOKENIZER = AutoTokenizer.from_pretrained(TINY / "teacher")


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    """Returns the folder of all runs, played by one process."""
    folder = tmp_path_factory.mktemp("evaluation")
    fresh.call(evaluator_runs.play, folder)
    return folder


def facts(stage, name):
    found = json.loads((stage / f"{name}.json").read_text())
    return found if len(found) > 1 else found[0]


def evaluations(stage, name):
    """Returns the evaluated figures by step."""
    return {row["step"]: row["eval"] for row in read_metrics(stage / name) if "eval" in row}


def training_rows(stage, name):
    return [{k: v for k, v in row.items() if not k.startswith(("eval/", "layer_map"))} for row in rows(stage / name)]


# --- an evaluation and the run -------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["", "stream-", "align-"], ids=["cached", "stream", "alignment"])
def test_an_evaluation_leaves_the_run_as_it_was(stage, form):
    """With dropout and a batch asked ahead, and with maps of the layers too: weights, optimizer, random state and
    figures, bit for bit.
    """
    assert tensors(stage / f"{form}with" / "checkpoint-6") == tensors(stage / f"{form}without" / "checkpoint-6")
    assert training_rows(stage, f"{form}with") == training_rows(stage, f"{form}without")
    assert evaluations(stage, f"{form}with").keys() == {2, 4, 6} and not evaluations(stage, f"{form}without")
    assert [row["step"] for row in rows(stage / f"{form}with") if "layer_map" in row] == [2, 4, 6]
    places = [sorted((stage / f"{form}{name}" / "checkpoint-6").glob("data-*")) for name in ("with", "without")]
    assert [file.read_text() for file in places[0]] == [file.read_text() for file in places[1]] != []


def test_a_run_killed_in_an_evaluation_resumes_exactly(stage):
    killed, resumed = facts(stage, "killed")
    assert killed["codes"] == [-9, -9] and resumed["codes"] == [0, 0]
    assert "evaluation (opt 2)" in killed["log"] and "evaluation (opt 4)" not in killed["log"]
    assert "resuming from" in resumed["log"]
    assert differences(stage / "with", stage / "killed", 6) == []


def test_the_time_of_an_evaluation_is_no_steps(stage):
    """One of them took two seconds and more."""
    lines = read_metrics(stage / "killed")
    (slow,) = [i for i, row in enumerate(lines) if row.get("eval", {"seconds": 0})["seconds"] > 2]
    for name in ("step_time_s", "teacher_wait_s", "data_wait_s"):
        assert max(row[name] for row in lines[slow : slow + 2]) < 1.5, name


def test_a_signal_ends_an_evaluation_and_the_run(stage):
    by_sigterm, later = facts(stage, "stopped")
    assert by_sigterm["codes"] == [75, 75] and "stopped by SIGTERM at step 4 of 6" in by_sigterm["log"]
    assert later["codes"] == [0, 0] and "complete: 6 of 6" in later["log"]  # the signal came after the last step
    assert evaluations(stage, "stopped").keys() == {2}
    assert "stopped by SIGTERM at step 4" in (stage / "stopped" / "warnings.jsonl").read_text()
    assert tensors(stage / "stopped" / "checkpoint-6") == tensors(stage / "without" / "checkpoint-6")
    assert training_rows(stage, "stopped") == training_rows(stage, "without")


# --- its figures ---------------------------------------------------------------------------------------------


def test_figures_are_those_of_a_plain_computation(stage):
    """In one process, from the checkpoint's weights, with the logits of all tokens at once."""
    found = evaluations(stage, "with")[6]
    student = LlambaForCausalLM.from_pretrained(stage / "with" / "checkpoint-6").eval()
    teacher = AutoModelForCausalLM.from_pretrained(stage / "teacher").eval()
    text = (TINY / "text" / "english.txt").read_text()[:10_000]
    ids = [i for part in text.split("\n\n") for i in [*TOKENIZER(part).input_ids, TOKENIZER.eos_token_id]]
    windows = torch.tensor(ids[: 7 * 33]).view(7, 33)
    with torch.no_grad():
        logits, teacher_logits = student(windows[:, :-1]).logits, teacher(windows[:, :-1]).logits
    total, kl, ce = compute_distill_loss(
        logits, teacher_logits, windows[:, 1:], torch.ones(7, 32, dtype=torch.bool), 1.0, 0.1, 1.0
    )
    expected = {"loss": total, "ce": ce, "kl": kl, "perplexity": ce.exp()}
    assert {name: found[name] for name in expected} == pytest.approx({k: v.item() for k, v in expected.items()}, 1e-5)
    same = logits.argmax(-1) == teacher_logits[..., :1024].argmax(-1)
    assert found["agreement"] == same.double().mean() and found["tokens"] == 7 * 32

    questions = build_questions(load_mmlu(str(TINY / "mmlu")), num_fewshot=0, limit=3)
    answers = score(student, TOKENIZER, questions, 2, torch.device("cpu"), 32)
    assert found["mmlu"] == sum(answer.prediction == answer.answer for answer in answers) / len(questions)


def without_time(figures):
    return {name: value for name, value in figures.items() if name != "seconds"}


def test_figures_do_not_depend_on_the_number_of_ranks_or_the_way_to_the_teacher(stage):
    one, two, three = (without_time(evaluations(stage, f"ranks-{n}")[1]) for n in (1, 2, 3))
    assert one == two == three
    for name in ("logits", "colocated", "align"):
        other = without_time(evaluations(stage, name)[1])
        left_out = (
            ("mmlu", "loss") if name == "align" else ("mmlu",)
        )  # an alignment has a teacher for --kl_weight 0 too
        expected = {name: one[name] for name in one if name not in left_out}
        assert {name: other[name] for name in expected} == pytest.approx(expected, rel=1e-6)
    assert evaluations(stage, "align")[1]["loss"] == evaluations(stage, "align")[1]["ce"]  # as --kl_weight says


def test_without_a_teacher_there_is_nothing_to_agree_with(stage):
    alone, beside = evaluations(stage, "no-teacher")[1], evaluations(stage, "ranks-1")[1]
    assert without_time(alone).keys() == {"loss", "ce", "perplexity", "tokens"}
    assert alone["loss"] == alone["ce"] == beside["ce"]


def test_the_log_has_one_line_for_an_evaluation(stage):
    (line,) = [line for line in facts(stage, "with")["log"].splitlines() if "evaluation (opt 4)" in line]
    figures = evaluations(stage, "with")[4]
    assert f"| ce {figures['ce']:.4f} | kl {figures['kl']:.4f} |" in line and f"mmlu {figures['mmlu']:.4f} |" in line


def test_nodes_that_read_another_text_are_an_error(stage):
    fact = facts(stage, "other-windows")
    assert 2 in fact["codes"] and "are not the same on all nodes" in fact["log"]


# --- its parts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n_windows,world_size", [(1, 1), (7, 1), (7, 2), (7, 3), (12, 3), (2, 4)])
def test_every_window_is_in_one_batch_and_all_ranks_have_as_many(n_windows, world_size):
    windows = torch.arange(n_windows * 5).view(n_windows, 5)
    shares = [share_of_windows(windows, 2, rank, world_size) for rank in range(world_size)]
    assert len({len(share) for share in shares}) == 1
    in_order = [batch for batches in zip(*shares, strict=True) for batch in batches]
    assert all(batch.input_ids.shape == batch.labels.shape == batch.loss_mask.shape == (2, 4) for batch in in_order)
    real = [torch.cat([b.input_ids[b.loss_mask[:, 0]], b.labels[b.loss_mask[:, 0]][:, -1:]], dim=1) for b in in_order]
    assert torch.equal(torch.cat(real), windows)


def arguments(*more):
    line = ["--preset", "tiny", "--eval_interval", "5", "--max_steps", "20", *more]
    return parse_train_args(line)


@pytest.fixture
def alone(no_torchrun):
    """Gives the one rank of a run."""
    with process_groups(torch.device("cpu")) as ranks:
        yield ranks


@pytest.fixture
def evaluator(alone):
    """Makes an evaluator without a teacher, and with a ruined student."""
    args = arguments("--kl_weight", "0", "--eval_mmlu_dir", str(TINY / "mmlu"), "--seq_length", "32", "--layers", "-1")
    student = tiny_student(vocab_size=1024)
    student.lm_head.weight.data.fill_(float("nan"))
    model = DistillationModel(student.train(), None, 1024, args, chunk_tokens=64)
    material = read_material(args, TOKENIZER, alone)
    return Evaluator(args, material, TOKENIZER, alone, model, NoTeacher(alone.device), StopRequest(None))


def test_a_broken_model_is_logged_and_ends_no_run(evaluator, caplog):
    figures = evaluator.evaluate()
    assert all(math.isnan(figures[name]) for name in ("loss", "ce", "perplexity", "mmlu"))
    assert "evaluation: no accuracy on MMLU" in caplog.text and "are not finite" in caplog.text
    assert evaluator.model.student.training


def test_a_run_that_is_asked_to_stop_is_not_evaluated(evaluator):
    evaluator.stop.signalled = 1
    row = {"step": 5}
    evaluator.add_to(row, 20)
    assert row == {"step": 5} and evaluator.model.student.training


def test_when_an_evaluation_is_due(evaluator):
    assert [step for step in range(1, 18) if evaluator.is_due(step, 17)] == [5, 10, 15, 17]
    evaluator.args.eval_interval = 0
    assert not any(evaluator.is_due(step, 17) for step in range(1, 18))


def test_a_run_without_evaluations_reads_nothing(alone):
    args = parse_train_args(["--preset", "tiny"])
    assert args.eval_interval == 0 and read_material(args, TOKENIZER, alone) is None


def test_the_tiny_preset_has_text_to_evaluate_on(alone):
    args = arguments()
    material = read_material(args, TOKENIZER, alone)
    assert isinstance(material, Material) and material.windows.shape == (64, 257) and not material.subjects
    assert TextSource.for_evaluation_in_training(args).name.endswith("heldout.jsonl")


@pytest.mark.parametrize(
    "more,words",
    [
        (["--eval_dataset_name", "nowhere.jsonl"], ["--eval_dataset_name 'nowhere.jsonl'", "no such file"]),
        (["--eval_dataset_split", "test"], ["--eval_dataset_split 'test'"]),
        (["--eval_dataset_subset", "part"], ["--eval_dataset_subset 'part'"]),
        (["--eval_mmlu_dir", "nowhere"], ["--eval_mmlu_dir nowhere"]),
        (["--seq_length", "100000"], ["does not fill one window"]),
    ],
)
def test_mistakes_name_the_options_of_evaluation(alone, more, words):
    args = arguments(*more)
    with pytest.raises(ValueError) as error:
        read_material(args, TOKENIZER, alone)
    for word in words:
        assert word in str(error.value)


def test_a_part_of_the_training_data_can_be_held_out(tmp_path):
    """The name is then that of --dataset_name, in errors too."""
    text = TINY / "text" / "heldout.jsonl"
    line = ["--preset", "tiny", "--dataset_name", str(text), "--dataset_split", "train[:90%]", "--eval_interval", "1"]
    args = parse_train_args([*line, "--eval_dataset_split", "train[90%:]", "--no_dataset_streaming"])
    windows = read_windows(TextSource.for_evaluation_in_training(args), TOKENIZER, 2, 16)
    documents = [json.loads(row)["text"] for row in text.read_text().splitlines()]
    first = TOKENIZER(documents[round(0.9 * len(documents))]).input_ids
    assert windows.flatten().tolist()[: len(first)] == first[: windows.numel()]
    args.dataset_name = str(tmp_path / "absent.jsonl")
    with pytest.raises(ValueError, match="--dataset_name .*absent.jsonl"):
        read_windows(TextSource.for_evaluation_in_training(args), TOKENIZER, 2, 16)


@pytest.mark.parametrize(
    "training,held_out,words",
    [
        ("train[:90%]", "train[45:]", "its rows 45 to 53 of split 'train' (from 0) are trained on by this run"),
        ("train[:90%]", "train[90%:]", None),
    ],
)
def test_a_run_is_not_evaluated_on_rows_it_is_trained_on(alone, tmp_path, monkeypatch, training, held_out, words):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "hf")
    Dataset.from_dict({"text": [f"row {i} " * 20 for i in range(60)]}).save_to_disk(tmp_path / "saved")
    more = ["--dataset_name", str(tmp_path / "saved"), "--dataset_split", training, "--seq_length", "16"]
    args = arguments(*more, "--eval_dataset_name", str(tmp_path / "saved"), "--eval_dataset_split", held_out)
    if words is None:
        ids = read_material(args, TOKENIZER, alone).windows.flatten().tolist()
        assert TOKENIZER.decode(ids).startswith("row 54 row 54")
    else:
        with pytest.raises(ValueError, match=re.escape(words)):
            read_material(args, TOKENIZER, alone)


def test_the_row_and_the_line_of_an_evaluation(tmp_path):
    figures = {"loss": 701.25, "ce": 700.5, "kl": math.nan, "perplexity": math.inf, "tokens": 64, "seconds": 1.25}
    row = {"step": 3, "micro_step": 6, "eval": figures}
    assert format_evaluation(row) == "evaluation (opt 3) | loss 701.2500 | ce 700.5000 | kl nan | perplexity inf | 1.2s"
    with RunLog(arguments("--output_dir", str(tmp_path)), 0, is_main=True) as log:
        log.write(row)
    written = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert written == {**row, "eval": {**figures, "kl": None, "perplexity": None}}
