"""Held against lm-evaluation-harness itself: its own `mmlu` task, prompts, requests and sums, on a tiny Llama and a
tiny hybrid; and its tasks on a model that the evaluation has loaded. `cais/mmlu` and other data sets are folders made
here, which `datasets` takes for the hub's where a folder has that name.
"""

import json
import random
import re
import string
from pathlib import Path

import datasets
import lm_eval
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from evaluation import mmlu, mmlu_files
from evaluation.lm_eval_tasks import PIN, check_tasks, run_task, task_manager
from evaluation.mmlu import GROUP_OF
from evaluation.mmlu_files import Example, Subject
from evaluation.statistics import aggregate
from inputs.option_values import PRESETS
from tests.byte_tokenizers import TOKENIZERS
from tests.evaluation.mmlu_data import write_snapshot
from tests.tiny import tiny_model

REAL_MMLU = Path(__file__).parents[2] / ".." / "shared" / "data" / "mmlu"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def nothing_of_the_environment(monkeypatch):
    """Keeps lm-eval from asking pip for all packages, each time, for its report."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda report: None)


@pytest.fixture
def hub(tmp_path, monkeypatch, own_cache) -> Path:
    """Sets up a directory whose folders stand in for data sets of the hub."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    return tmp_path


def make_subject(name: str, n_test: int) -> Subject:
    """Returns rows like real ones: blanks at the ends, empty lines, other scripts, long and empty choices."""
    dice = random.Random(name)

    def text(longest: int) -> str:
        letters = string.ascii_letters + string.digits + "      .,:;()\n\u00e9\u4e2d\u2211"
        return "".join(dice.choice(letters) for _ in range(dice.randint(0, longest)))

    def example() -> Example:
        return Example(f" {text(90)}\n", tuple(text(30) for _ in range(4)), dice.choice("ABCD"))

    return Subject(name, [example() for _ in range(5)], [example() for _ in range(n_test)])


def by_lm_eval(model, tokenizer, tasks: list[str], num_fewshot: int, max_length: int) -> dict:
    lm = HFLM(pretrained=model, backend="causal", tokenizer=tokenizer, batch_size=4, max_length=max_length)
    return lm_eval.simple_evaluate(
        lm, tasks=tasks, num_fewshot=num_fewshot, task_manager=task_manager(), bootstrap_iters=1000
    )


def check_answers(theirs: dict, questions: list[mmlu.Question], ours: list[mmlu.Prediction]) -> None:
    """Compares question by question: the prompt, the four log-likelihoods, the answer."""
    for question, prediction in zip(questions, ours, strict=True):
        samples = theirs["samples"][f"mmlu_{question.subject}"]
        (sample,) = [sample for sample in samples if sample["doc_id"] == question.index]
        assert [tuple(arguments) for arguments in sample["arguments"]] == [
            (question.prompt, f" {letter}") for letter in "ABCD"
        ]
        expected = [value for value, _ in sample["filtered_resps"]]
        assert prediction.log_likelihoods == pytest.approx(expected, abs=1e-4)
        assert prediction.prediction == "ABCD"[expected.index(max(expected))]
        assert (prediction.prediction == prediction.answer) == (sample["acc"] == 1.0)


@pytest.mark.slow
def test_the_whole_of_mmlu_with_its_groups(hub):
    subjects = [make_subject(name, 2 + (i % 6 == 0)) for i, name in enumerate(sorted(GROUP_OF))]
    write_snapshot(hub / "cais" / "mmlu", subjects)
    tokenizer = AutoTokenizer.from_pretrained(PRESETS / "tiny" / "teacher")
    model = tiny_model("hybrid", len(tokenizer), initializer_range=0.2)
    theirs = by_lm_eval(model, tokenizer, ["mmlu"], 1, 4096)
    questions = mmlu.build_questions(mmlu_files.load_mmlu("cais/mmlu"), num_fewshot=1)
    ours = mmlu.score(model, tokenizer, questions, None, CPU, 4096)
    check_answers(theirs, questions, ours)

    found = aggregate(ours)
    scores = {"mmlu": found} | {f"mmlu_{name}": score for name, score in found["subjects"].items()}
    scores |= {f"mmlu_{name.replace(' ', '_')}": score for name, score in found["groups"].items()}
    assert scores.keys() == theirs["results"].keys() and len(scores) == 57 + 4 + 1
    for task, result in theirs["results"].items():
        assert scores[task]["acc"] == pytest.approx(result["acc,none"])
        assert scores[task]["stderr"] == pytest.approx(result["acc_stderr,none"])
    assert theirs["configs"]["mmlu_anatomy"]["metadata"]["version"] == 1.0  # what mmlu.PROMPT says
    assert mmlu.PROMPT.endswith("version 1")


@pytest.mark.skipif(not REAL_MMLU.is_dir(), reason="../shared/data/mmlu, a part of the real MMLU, is not there")
@pytest.mark.parametrize("n", [2, pytest.param(None, marks=[pytest.mark.bench, pytest.mark.timeout(1800)])])
@pytest.mark.parametrize("kind", ["llama", "hybrid"])
def test_real_questions_with_five_shots(hub, kind, n):
    """Compares the first two of each subject; `make test-bench` compares all 2,052, which takes minutes."""
    subjects = [Subject(s.name, s.dev, s.test[:n]) for s in mmlu_files.load_mmlu(REAL_MMLU)]
    write_snapshot(hub / "cais" / "mmlu", subjects)
    tokenizer = AutoTokenizer.from_pretrained(PRESETS / "tiny" / "teacher")
    model = tiny_model(kind, len(tokenizer), initializer_range=0.2)
    theirs = by_lm_eval(model, tokenizer, [f"mmlu_{s.name}" for s in subjects], 5, 4096)
    questions = mmlu.build_questions(subjects, num_fewshot=5)
    check_answers(theirs, questions, mmlu.score(model, tokenizer, questions, None, CPU, 4096))


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(("num_fewshot", "max_length"), [(0, 4096), (2, 600)])
def test_tokenizers_of_all_kinds_and_prompts_that_are_cut(hub, kind, num_fewshot, max_length):
    subject = make_subject("anatomy", 8)
    write_snapshot(hub / "cais" / "mmlu", [subject])
    tokenizer, model = TOKENIZERS[kind](), tiny_model("llama", 300, initializer_range=0.2)
    questions = mmlu.build_questions([subject], num_fewshot)
    lengths = [len(tokenizer(question.prompt).input_ids) for question in questions]
    assert max_length == 4096 or min(lengths) < max_length < max(lengths)
    theirs = by_lm_eval(model, tokenizer, ["mmlu_anatomy"], num_fewshot, max_length)
    check_answers(theirs, questions, mmlu.score(model, tokenizer, questions, 3, CPU, max_length))


# Its other tasks


def write_table(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def write_card(folder: Path, configuration: str, splits: dict[str, str]) -> None:
    files = [line for split, path in splits.items() for line in (f"  - split: {split}", f"    path: {path}")]
    card = ["---", "configs:", f"- config_name: {configuration}", "  data_files:", *files, "---", ""]
    (folder / "README.md").write_text("\n".join(card))


@pytest.fixture
def arc_and_gsm8k(hub) -> None:
    choices = {"label": ["A", "B", "C"], "text": ["the sun", "a stone", "rain"]}
    rows = [{"id": str(i), "question": f"What is hot in {i}?", "choices": choices, "answerKey": "A"} for i in range(5)]
    folder = hub / "allenai" / "ai2_arc"
    for split in ("train", "validation", "test"):
        write_table(folder / f"{split}.parquet", rows)
    write_card(folder, "ARC-Challenge", {split: f"{split}.parquet" for split in ("train", "validation", "test")})
    folder = hub / "openai" / "gsm8k"
    for split in ("train", "test"):
        sums = [{"question": f"What is {i} and 1?", "answer": f"It is.\n#### {i + 1}"} for i in range(6)]
        write_table(folder / f"{split}.parquet", sums)
    write_card(folder, "main", {split: f"{split}.parquet" for split in ("train", "test")})


def test_a_loaded_hybrid_does_tasks_of_choice_and_of_generation(arc_and_gsm8k):
    tokenizer = AutoTokenizer.from_pretrained(PRESETS / "tiny" / "teacher")
    model = tiny_model("hybrid", len(tokenizer), initializer_range=0.2)
    found = run_task("arc_challenge", model, tokenizer, 2, 512, None, 4, local_files_only=True)
    assert found["n_samples"]["arc_challenge"]["effective"] == 4
    theirs = by_lm_eval(model, tokenizer, ["arc_challenge"], 0, 512)
    alone = run_task("arc_challenge", model, tokenizer, 2, 512, None, None, local_files_only=True)
    expected = {key: theirs["results"]["arc_challenge"][key] for key in ("acc,none", "acc_norm,none")}
    assert alone["results"]["arc_challenge"].items() >= expected.items()
    assert alone["versions"]["lm_eval"] == lm_eval.__version__ and alone["n_shot"] == {"arc_challenge": 0}

    generated = run_task("gsm8k", model, tokenizer, None, 1024, 1, 2, local_files_only=True)
    assert generated["results"]["gsm8k"].keys() >= {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert generated["n_shot"] == {"gsm8k": 1}
    json.dumps(generated, allow_nan=False)
    check_tasks(["arc_challenge", "gsm8k"], local_files_only=True)
    with pytest.raises(ValueError, match="--tasks gsm8k: lm-evaluation-harness refuses: .*max"):
        run_task("gsm8k", model, tokenizer, None, 64, 1, 2, local_files_only=True)


def test_a_refusal_without_words_gets_some(monkeypatch):
    def refuse(*args, **more):
        raise AssertionError

    monkeypatch.setattr("lm_eval.simple_evaluate", refuse)
    tokenizer = TOKENIZERS["one token each"]()
    with pytest.raises(ValueError, match="refuses: it does not say why; --max_length 20 may be too short"):
        run_task("gsm8k", tiny_model("llama", 300), tokenizer, 1, 20, 1, 2, local_files_only=True)


def test_a_task_that_is_not_there_gets_the_nearest_names():
    with pytest.raises(ValueError, match="--tasks helaswag: .*did you mean hellaswag"):
        check_tasks(["helaswag", "arc_challenge"], local_files_only=True)


def test_a_task_without_its_data_is_one_error(hub):
    with pytest.raises(ValueError, match="--tasks arc_easy: its data is not in the local cache"):
        check_tasks(["arc_easy"], local_files_only=True)


def test_one_release_is_named_everywhere():
    root = Path(__file__).parents[2]
    for name in ("requirements-dev.txt", "Makefile", "README.md", "README.zh-CN.md"):
        found = re.findall(r"lm-eval==[\d.]+\d", (root / name).read_text())
        assert set(found) == {PIN}, name
    assert f"lm-eval=={lm_eval.__version__}" == PIN


def test_without_the_package_its_installation_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ValueError, match="--tasks gsm8k: needs lm-evaluation-harness; `pip install lm-eval=="):
        check_tasks(["gsm8k"], local_files_only=True)
