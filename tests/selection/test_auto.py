"""`--layers auto:K` of train_gpus.py: made before training, used, resumed, and refused."""

import json
import os
import shutil

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_gpus
from arguments import parse_eval_args, parse_train_args
from conversion.options import parse_make_args
from inputs.value_types import AutoLayers
from model_utils import get_configs
from selection import auto, folder, material
from selection.ablation import Ablations, mean_growth
from selection.material import Material, build_probes
from tests import fresh
from tests.selection.one_rank import RANK
from tests.selection.test_choose_layers import all_probes_count, stop_after_five_rows
from tests.small_runs import make_models, options
from tests.tiny import tiny_hybrid, tiny_student, tiny_teacher
from text.sources import TextSource
from utils import TakenError, lock_dir


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = make_models(tmp_path_factory.mktemp("models"))
    tiny_hybrid(teacher=tiny_teacher(vocab_size=1030), vocab_size=1024).save_pretrained(folder / "hybrid")
    tiny_student(vocab_size=1024, fitted_beside={"0": [1]}).save_pretrained(folder / "beside")
    return folder


@pytest.fixture
def student(models, tmp_path):
    """Returns a student whose folder is this test's own."""
    return shutil.copytree(models / "plain", tmp_path / "student")


def argv_of(models, student, folder, **changes):
    values = dict(student_model=student, layers="auto:2", max_steps=2, save_interval=2)
    return options(models, folder, **{**values, **changes})


def train(argv, n_ranks=1, arm=all_probes_count):
    return fresh.ranks(argv, n_ranks, arm=arm)


def probes_of(models):
    """Returns the probes of a run, those of their texts that it chooses on."""
    probes, _ = build_probes(AutoTokenizer.from_pretrained(models / "teacher"), 6, 0, 128)
    return Material(torch.zeros(3, 2), probes).part(False).probes


def attention_layers(folder):
    return json.loads((folder / "latest" / "config.json").read_text())["attention_layers"]


def test_a_run_chooses_its_layers_and_a_resumed_one_keeps_them(models, student, tmp_path):
    folder = tmp_path / "run"
    codes, log = train(argv_of(models, student, folder), 2)
    assert codes == [0, 0], log
    choice = json.loads((student / "choice" / "choice.json").read_text())
    layers = choice["layers"]
    assert len(layers) == 2 and attention_layers(folder) == layers
    assert yaml.safe_load((folder / "args.yaml").read_text())["layers"] == layers
    assert (
        "--layers auto:2: no choice in" in log and f"--layers auto:2: --layers {' '.join(map(str, layers))}, of" in log
    )
    assert "not held out: this run, or that of the student, trains on rows of it" in choice["held_out"]
    assert choice["cost"].endswith("of the 256 that the planned run trains on")  # 2 steps of 2 ranks' 2 x 32 tokens

    shutil.rmtree(student / "choice")  # a resumed run needs none
    codes, log = train(argv_of(models, student, folder, max_steps=4, resume="auto"))
    assert codes == [0] and "no choice in" not in log, log
    assert attention_layers(folder) == layers and not (student / "choice").exists()
    codes, log = train(argv_of(models, student, folder, max_steps=6, resume="auto", layers="auto:1"))
    assert codes == [2] and "--layers auto:1: the run of" in log and "this would be another run" in log


def test_a_choice_that_is_there_is_used(models, student, tmp_path):
    (student / "choice").mkdir()
    codes, log = train(argv_of(models, student, tmp_path / "first"))
    assert codes == [0], log
    before = (student / "choice" / "choice.json").read_bytes()
    config = tmp_path / "config.yaml"
    config.write_text("layers: auto:2\n")
    codes, log = train([*argv_of(models, student, tmp_path / "second", layers=None), "--config", str(config)])
    assert codes == [0] and "no choice in" not in log and "made before training" not in log
    assert (student / "choice" / "choice.json").read_bytes() == before
    assert attention_layers(tmp_path / "first") == attention_layers(tmp_path / "second")

    codes, log = train(argv_of(models, student, tmp_path / "third", layers="auto:1", seed=7))  # of the same rows
    assert codes == [0] and "it is made again, of the rows in measured.jsonl" in log
    assert len(attention_layers(tmp_path / "third")) == 1

    tiny_teacher(vocab_size=1030, initializer_range=0.1).save_pretrained(tmp_path / "other")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(models / "teacher" / name, tmp_path / "other")
    codes, log = train(argv_of(models, student, tmp_path / "fourth", teacher_model=tmp_path / "other"))
    [line] = [line for line in log.splitlines() if line.startswith("error:")]
    assert codes == [2] and f"--teacher_model {models / 'teacher'} (now {tmp_path / 'other'})" in line
    assert "--layers auto:2" in line and "is made again before training" in line and not (tmp_path / "fourth").exists()

    args = parse_train_args(argv_of(models, student.rename(tmp_path / "moved"), tmp_path / "fifth", layers="auto:1"))
    auto.check_auto(args, None)  # the same files, under another name
    assert auto._finished(args, auto._paths(args))["layers"] == attention_layers(tmp_path / "third")
    os.utime(tmp_path / "moved" / "model.safetensors")
    with pytest.raises(ValueError, match=r"is with --student_model .*/student \(now .*/moved\); move"):
        auto.check_auto(args, None)


def test_a_run_keeps_the_heads_that_the_probes_miss_most(models, student, tmp_path):
    argv = argv_of(models, student, tmp_path / "run", layers="3", heads="auto:4")
    codes, log = train(argv, 2)
    assert codes == [0, 0] and "--heads auto:4: at most about" not in log, log
    rows = (student / "choice" / "measured.jsonl").read_text().splitlines()
    names = [json.loads(row)["name"].split() for row in rows]
    assert {kind for kind, _ in names} == {"ablation"} and len(names) == 20  # no layers were searched for
    assert not (student / "choice" / "choice.json").exists()
    best = expected_heads(models, [3], 2)
    config = json.loads((tmp_path / "run" / "latest" / "config.json").read_text())
    kept = {(int(layer), head) for layer, heads in config["attention_heads"].items() for head in heads}
    kept |= {(layer, head) for layer in config["attention_layers"] if layer != 3 for head in range(4)}
    assert kept == best and 3 in config["attention_layers"]
    options = yaml.safe_load((tmp_path / "run" / "args.yaml").read_text())
    assert set(options["heads"]) == {f"{layer}:{head}" for layer, head in best} and options["layers"] == [3]
    codes, log = train(
        [*argv_of(models, student, tmp_path / "run", layers="3", heads="auto:4", max_steps=4), "--resume", "auto"]
    )
    assert codes == [0] and "no choice in" not in log, log

    codes, log = train(argv_of(models, student, tmp_path / "both", layers="auto:1", heads="auto:2"))
    assert codes == [0], log
    assert (student / "choice" / "measured.jsonl").read_text().splitlines()[: len(rows)] == rows
    choice = json.loads((student / "choice" / "choice.json").read_text())
    assert yaml.safe_load((tmp_path / "both" / "args.yaml").read_text())["heads"] == choice["heads"]["names"]
    assert choice["heads"]["whole"] == choice["layers"] and len(choice["ablation"]["heads"]) == 16
    args = parse_train_args(
        argv_of(models, student, tmp_path / "fourth", layers=str(choice["layers"][0]), heads="auto:2")
    )
    assert auto._finished(args, auto._paths(args)) == choice  # beside the same layers
    for layers, n_groups in (("-1", 1), (str(choice["layers"][0]), 2), ("auto:1", 2)):  # of what was ablated
        changes = dict(layers=layers, heads=f"auto:{2 * n_groups}")
        args = parse_train_args(argv_of(models, student, tmp_path / "fourth", **changes))
        heads = expected_heads(models, [] if layers == "-1" else choice["layers"], n_groups)
        found = auto._finished(args, auto._paths(args))["heads"]["names"]
        assert set(found) == {f"{layer}:{head}" for layer, head in heads}
    args = parse_train_args(argv_of(models, student, tmp_path / "fourth", layers="auto:2", heads="auto:2"))
    assert auto._finished(args, auto._paths(args)) is None  # its layers have to be chosen first


def expected_heads(models, whole, n_groups):
    """Returns the heads that are found in the teacher: both of each key/value head."""
    ablations = Ablations(AutoModelForCausalLM.from_pretrained(models / "teacher"), probes_of(models))
    own = ablations.teacher_scores
    sums = {
        (layer, group): sum(mean_growth(ablations.without(layer, [2 * group + i]), own) for i in range(2))
        for layer in range(4)
        for group in range(2)
        if layer not in whole
    }
    best = sorted(sums, key=lambda group: -sums[group])[:n_groups]
    return {(layer, 2 * group + i) for layer, group in best for i in range(2)}


@pytest.mark.parametrize(
    "changes,words",
    [
        (dict(heads="auto:0"), "--heads auto:0: expected at least 1 head"),
        (dict(heads="auto:2 1:3"), "--heads auto:2 1:3: auto:K stands alone"),
        (dict(heads="auto:14", layers="3"), "--heads auto:14: expected 2 to 12 heads, those of layers that are not"),
        (dict(heads="auto:14", layers="auto:1"), "--layers auto:1 --heads auto:14: expected 2 to 12 heads"),
        (dict(heads="auto:3"), "a multiple of 2: so many share a key/value head and its cache"),
    ],
)
def test_heads_that_cannot_be_chosen_are_one_line(models, tmp_path, changes, words):
    argv = argv_of(models, models / "plain", tmp_path / "run", **{"layers": "-1", **changes})
    with pytest.raises(ValueError) as error:
        train_gpus.main(parse_train_args(argv))
    assert words in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize("layers", ["-1", "auto:2"])
def test_heads_need_a_probe_that_the_teacher_can_do(models, student, tmp_path, layers):
    codes, log = train(argv_of(models, student, tmp_path / "run", layers=layers, heads="auto:2"), arm=None)
    assert codes == [2] and "--heads auto:2: no probe could be used to compare heads (copying: its texts" in log
    assert "single swaps measured" not in log  # it is said before an hour of measuring


def test_an_error_of_the_choice_names_what_the_run_has(models, student, tmp_path):
    (student / "choice").touch()
    codes, log = train(argv_of(models, student, tmp_path / "run"))
    assert codes == [2] and f"error: --layers auto:2: {student / 'choice'}: cannot be written (File exists)" in log
    (student / "choice").unlink()
    assert json.loads((tmp_path / "run" / "status.json").read_text())["status"] == "refused"
    (tmp_path / "one.jsonl").write_text((models / "short.jsonl").read_text().splitlines()[0])
    changes = dict(eval_dataset_name=tmp_path / "one.jsonl", eval_interval=1)
    codes, log = train(argv_of(models, student, tmp_path / "run", **changes))
    words = f"--layers auto:2: --eval_dataset_name '{tmp_path / 'one.jsonl'}': split 'train' does not fill one window"
    assert codes == [2] and words in log


def test_a_run_waits_for_the_choice_of_another(models, student, tmp_path, monkeypatch):
    """Runs of a sweep begin at the same time."""
    args = parse_train_args(argv_of(models, student, tmp_path / "run"))
    lock, finished = lock_dir("--output", student / "choice"), {"layers": [0, 3], "ablation": None}
    calls = iter([None, finished])
    monkeypatch.setattr(auto, "_finished", lambda *_: next(calls))
    monkeypatch.setattr(folder.time, "sleep", lambda _: lock.close())
    assert auto.chosen(args, torch.device("cpu"), RANK)["args"].layers == [0, 3]
    with folder.taken(student / "choice"), pytest.raises(TakenError), folder.taken(student / "choice"):
        pass


def test_the_text_is_read_as_the_run_reads_it(models, student, tmp_path, monkeypatch):
    found = []
    monkeypatch.setattr(auto, "make_choice", lambda asked, checked, *_: found.append(checked.text))
    changes = dict(skip_bad_rows=True, dataset_revision="abc", dataset_text_field="body")
    args = parse_train_args(argv_of(models, student, tmp_path, **changes))
    auto._make(args, torch.device("cpu"), RANK)
    assert found == [TextSource.for_evaluation_in_training(args)]
    assert (found[0].skip_bad_rows, found[0].revision, found[0].flags.name) == (True, "abc", "--dataset_name")


def test_a_student_that_cannot_be_written_has_its_choice_in_the_run(models, student, tmp_path, monkeypatch):
    args = parse_train_args(argv_of(models, student, tmp_path / "run"))
    assert auto.folder_of_run(args) == student / "choice"
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert auto.folder_of_run(args) == tmp_path / "run" / "choice"
    (student / "choice").mkdir()
    (student / "choice" / "choice.json").touch()
    assert auto.folder_of_run(args) == student / "choice"
    with pytest.raises(ValueError, match=r"choice.json: is no choice .*; move .* away, and it is made again before"):
        auto.check_auto(args, None)
    (student / "choice" / "choice.json").write_text('{"layers": [1, 2], "request": {"n_kept": 2}}')
    with pytest.raises(ValueError, match=r"it has no ablation, left_out, made_with"):
        auto.check_auto(args, None)


def test_a_stopped_choice_is_no_obstacle(models, student, tmp_path):
    argv = argv_of(models, student, tmp_path / "run")
    codes, log = train(argv, arm=stop_after_five_rows)
    assert codes == [75], log
    rows = (student / "choice" / "measured.jsonl").read_bytes()
    assert len(rows.splitlines()) == 5
    codes, log = train(argv)
    assert codes == [0] and (student / "choice" / "measured.jsonl").read_bytes().startswith(rows), log

    (student / "choice" / "choice.json").unlink()
    codes, log = train(argv_of(models, student, tmp_path / "other", seq_length=20))
    assert codes == [0] and "is of a stopped choice on other texts" in log, log
    assert (student / "choice" / "1-measured.jsonl").read_bytes().startswith(rows)


@pytest.mark.parametrize(
    "layers,student,words",
    [
        ("auto:4", "plain", "--layers auto:4: expected --layers auto:1 to auto:3; the student has 4 layers"),
        (
            "auto:2",
            "hybrid",
            "--layers auto:2: --student_model is a hybrid already, with --layers 1 3 of its teacher",
        ),
        *(
            (f"{layers} --heads auto:2", "beside", "auto:2: the mixers of --student_model were fitted beside heads")
            for layers in ("auto:2", "3")
        ),
    ],
)
@pytest.mark.parametrize("plan", [True, False])
def test_what_cannot_be_chosen_is_one_line(models, tmp_path, layers, student, words, plan):
    argv = argv_of(models, models / student, tmp_path / "run", layers=layers, dry_run=plan)
    with pytest.raises(ValueError) as error:
        train_gpus.main(parse_train_args(argv))
    assert words in str(error.value) and not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "layers,words",
    [
        ("auto:0", "--layers auto:0: expected at least 1 layer"),
        ("auto:2 3", "--layers auto:2 3: auto:K stands alone"),
        ("auto:x", "'auto:x': expected the index of a layer, such as 14, or how many to choose, such as auto:4"),
    ],
)
def test_an_option_that_says_nothing_is_refused(layers, words):
    with pytest.raises(ValueError) as error:
        parse_train_args(["--layers", *layers.split()])
    assert words in str(error.value)


def test_other_entries_choose_nothing():
    with pytest.raises(ValueError, match="--layers auto:2: an evaluation chooses no layers"):
        parse_eval_args(["--preset", "tiny", "--which", "hybrid", "--layers", "auto:2"])
    with pytest.raises(ValueError, match="--heads auto:2: .* or leave the option out, with a --ckpt"):
        parse_eval_args(["--preset", "tiny", "--ckpt", "runs/x", "--heads", "auto:2"])
    with pytest.raises(ValueError, match="--layers auto:2: is for train_gpus.py"):
        parse_make_args(["--preset", "tiny", "--output", "x", "--layers", "auto:2"])
    assert str(AutoLayers(3)) == "auto:3" and material.ABOVE_CHANCE == 0.2


def test_the_plan_says_what_is_chosen_first(models, student, tmp_path, capsys):
    argv = argv_of(models, student, tmp_path / "run", dry_run=True)
    assert train_gpus.main(parse_train_args(argv)) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("--layers auto:2: they are chosen first, at most about ") and "equal distances" in printed
    assert not (student / "choice").exists() and not (tmp_path / "run").exists()
    argv = argv_of(models, student, tmp_path / "run", heads="auto:4", dry_run=True)
    assert train_gpus.main(parse_train_args(argv)) == 0
    assert capsys.readouterr().out.startswith("--layers auto:2 --heads auto:4: they are chosen first")
    planned, _ = auto.for_plan(parse_train_args(argv), get_configs(models / "teacher", student))
    assert planned.layers == [1, 3] and planned.heads == ["0:0", "0:1", "2:0", "2:1"]
