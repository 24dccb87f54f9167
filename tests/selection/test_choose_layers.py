"""choose_layers.py from its command line to its files: on one rank and two, stopped, resumed, and what it refuses."""

import json
import re
import shutil
import signal
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import choose_layers
from selection import checks, material
from selection.measurements import Measured
from selection.options import parse_choose_args
from tests import fresh
from tests.faults.scenarios import signal_self
from tests.launch import ROOT
from tests.small_runs import make_models
from tests.tiny import tiny_hybrid, tiny_student, tiny_teacher

FILES = {"choice.json", "choice.md", "choice.svg", "measured.jsonl", "settings.json", ".lock"}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = make_models(tmp_path_factory.mktemp("models"))
    tiny_hybrid(teacher=tiny_teacher(vocab_size=1030), vocab_size=1024).save_pretrained(folder / "hybrid")
    tiny_teacher(vocab_size=1030, num_hidden_layers=3).save_pretrained(folder / "shallow")
    tiny_student(vocab_size=1024, d_model=16).save_pretrained(folder / "narrow")
    return folder


def command(models, output=None, **changes):
    """Returns the options of a choice that takes a second."""
    values = dict(teacher_model=models / "teacher", student_model=models / "student", dtype="float32", budget=2)
    values |= dict(
        text=models / "short.jsonl", text_windows=3, seq_length=24, probe_texts=3, output=output, device="cpu"
    )
    values |= dict(preset="tiny", local_files_only="") | changes
    return [word for name, value in values.items() if value is not None for word in [f"--{name}", str(value)] if word]


def all_probes_count(rank):
    material.ABOVE_CHANCE = -1.0


def run(argv, n_ranks=1, arm=all_probes_count):
    codes, log = fresh.ranks(argv, n_ranks, choose_layers.main, arm)
    return codes, log


@pytest.fixture(scope="module")
def made(models, tmp_path_factory):
    """Returns the folder of a choice and what was printed."""
    folder = tmp_path_factory.mktemp("choice") / "out"
    codes, log = run(command(models, folder))
    assert codes == [0], log
    return folder, log


def content(folder):
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def test_it_prints_the_option_to_paste_and_writes_three_files(made):
    folder, log = made
    choice = json.loads((folder / "choice.json").read_text())
    assert {file.name for file in folder.iterdir()} == FILES
    assert f"--layers {' '.join(map(str, choice['layers']))}\n" in log and len(choice["layers"]) == 2
    assert re.search(
        r"at most about [\d,]+ tokens forward, [\d.e+]+% of the 819,200 that the planned run trains on", log
    )


def test_the_report_says_what_was_measured_on_what(made):
    report = (made[0] / "choice.md").read_text()
    choice = json.loads((made[0] / "choice.json").read_text())
    sections = re.findall("^## (.*)$", report, re.MULTILINE)
    assert sections == [
        "Sets of 2 layers, on texts that were kept aside", "How many layers", "KL against probes",
        "Each layer by itself", "Layers of the teacher, ablated",
        "Heads of the teacher, ablated", "Probes", "Made with",
    ]  # fmt: skip
    assert f"    --layers {' '.join(map(str, choice['layers']))}\n" in report
    assert choice["heads"] is None and "--heads" not in report
    assert (
        "nats per answer, over 2 texts." in report
        and "copying: left out; its texts have 240 tokens, and the teacher reads 128." in report
    )
    assert "KL + 0.3 x growth" in report and "; held out from what the run of --preset tiny trains on" in report
    tables = [block for block in report.split("\n\n") if block.startswith("|")]
    assert len(tables) == 6
    for table in tables:  # every figure with its interval, in as many columns as the header has
        assert len({line.count("|") for line in table.splitlines()}) == 1
    assert report.count("±") > 40


def test_the_picture_has_a_panel_for_heads_curves_and_caches(made):
    text = (made[0] / "choice.svg").read_text()
    ElementTree.fromstring(text)
    for title in ("loss without a head", "KL to the teacher", "retrieval: right answers", "MB of the cache"):
        assert title in text


def test_heads_beside_the_layers_and_without_any(models, made, tmp_path):
    """The rows of the layers are used; without `--budget` no layers are chosen."""
    folder = tmp_path / "out"
    shutil.copytree(made[0], folder)
    codes, log = run(command(models, folder, head_budget=2, head_choice="search"))
    choice, before = (json.loads((at / "choice.json").read_text()) for at in (folder, made[0]))
    names = choice["heads"]["names"]
    assert codes == [0] and f"--layers {' '.join(map(str, before['layers']))} --heads {','.join(names)}\n" in log, log
    assert choice["layers"] == before["layers"] == choice["heads"]["whole"] and choice["swaps"] == before["swaps"]
    report = (folder / "choice.md").read_text()
    section = report.split("## Heads that have to look far")[1].split("##")[0]
    assert f"beside those of layers {' '.join(map(str, before['layers']))}. The others see the first 4" in section
    assert section.count("\n| ") == 2 + 5  # 4, 3, 2, 1 key/value heads, and none
    caches = [one["cache_bytes"] for one in choice["heads"]["sets"]]
    assert caches == sorted(caches, reverse=True)
    assert caches[0] == choice["cache_bytes"][4] and caches[-1] == choice["cache_bytes"][2]
    ElementTree.fromstring((folder / "choice.svg").read_text())

    only_heads = command(models, tmp_path / "heads", budget=None, head_budget=2)
    codes, log = run([*only_heads, "--head_choice", "search"], 2)
    assert codes == [0, 0] and re.search(r"^--layers -1 --heads \d:\d,\d:\d$", log, re.MULTILINE), log
    report = (tmp_path / "heads" / "choice.md").read_text()
    assert re.findall("^## (.*)$", report, re.MULTILINE) == [
        "Heads that have to look far", "Layers of the teacher, ablated", "Heads of the teacher, ablated",
        "Probes", "Made with",
    ]  # fmt: skip
    codes, log = run([*only_heads, "--head_choice", "search"])
    assert codes == [0] and "holds this choice already" in log
    rows = (tmp_path / "heads" / "measured.jsonl").read_bytes()
    codes, log = run(only_heads)  # by ablation
    assert codes == [0] and "it is made again, of the rows" in log
    assert (tmp_path / "heads" / "measured.jsonl").read_bytes() == rows
    choice = json.loads((tmp_path / "heads" / "choice.json").read_text())
    sums = sums_of_groups(choice["ablation"]["heads"])
    layer, group = max(sums, key=sums.get)
    assert choice["heads"]["names"] == [f"{layer}:{2 * group}", f"{layer}:{2 * group + 1}"]
    report = (tmp_path / "heads" / "choice.md").read_text()
    assert "look far" not in report and "have the largest sums of growth" in report


def sums_of_groups(rows):
    """Returns the sums of the scores of both heads of each key/value head."""
    sums = {}
    for row in rows:
        layer, head = row["place"]
        sums[layer, head // 2] = sums.get((layer, head // 2), 0) + row["score"]
    return sums


def test_two_ranks_choose_the_same(models, made, tmp_path):
    codes, log = run(command(models, tmp_path), 2)
    assert codes == [0, 0], log
    ours, theirs = content(made[0]), content(tmp_path)
    assert ours["choice.json"] == theirs["choice.json"] and ours["choice.svg"] == theirs["choice.svg"]
    rows = [sorted(files["measured.jsonl"].splitlines()) for files in (ours, theirs)]
    assert rows[0] == rows[1]


def stop_after_five_rows(rank):
    all_probes_count(rank)
    put = Measured.put

    def put_and_stop(rows, *args):
        put(rows, *args)
        if len(rows.rows) == 5:
            signal_self(signal.SIGTERM)()

    Measured.put = put_and_stop


def test_a_signal_ends_it_and_its_rows_are_kept(models, made, tmp_path):
    codes, log = run(command(models, tmp_path), arm=stop_after_five_rows)
    assert codes == [75] and "stopped by SIGTERM" in log
    assert len((tmp_path / "measured.jsonl").read_bytes().splitlines()) == 5
    assert not (tmp_path / "choice.json").exists()
    codes, log = run(command(models, tmp_path))
    assert codes == [0], log
    assert {**content(tmp_path), "settings.json": b""} == {**content(made[0]), "settings.json": b""}


def test_a_finished_choice_is_used_and_other_models_are_refused(models, made):
    folder, _ = made
    before = content(folder)
    codes, log = run(command(models, folder))
    assert codes == [0] and "holds this choice already" in log and "--layers " in log and content(folder) == before
    codes, log = run(command(models, folder, student_model=models / "plain"))
    assert codes == [2] and "Traceback" not in log and content(folder) == before
    [line] = [line for line in log.splitlines() if line.startswith("error:")]
    assert f"--student_model {models / 'student'} (now {models / 'plain'})" in line and "another --output" in line
    codes, log = run(command(models, folder, seq_length=20))
    assert codes == [2] and "the choice there is with other texts" in log


def refusal(argv):
    """Returns the error of options that are refused before a weight is read."""
    with pytest.raises(ValueError) as error:
        choose_layers.main(parse_choose_args(argv))
    return str(error.value)


@pytest.mark.parametrize(
    "changes,words",
    [
        ({"budget": 4}, "--budget 4: expected 1 to 3 layers of the teacher's; the student has 4"),
        ({"budget": 0}, "--budget 0: expected at least 1"),
        ({"budget": None}, "--budget: is missing; give how many"),
        (
            {"head_budget": 10},
            "--head_budget 10: expected 2 to 8 heads, those of layers that are not whole, a multiple",
        ),
        ({"budget": None, "head_budget": 3}, "--head_budget 3: expected 2 to 16 heads"),
        ({"cache_bytes": 10**6}, "--budget 2 --cache_bytes 1000000: both say how many layers; give one of them"),
        ({"budget": None, "cache_bytes": 5}, "--cache_bytes 5: a single layer of the teacher's"),
        (
            {"student_model": "hybrid"},
            "--budget 2: --student_model is a hybrid already, with --layers 1 3 of its teacher",
        ),
        ({"student_model": "narrow"}, "--budget 2: the teacher's layers are 32 wide and the student's 16"),
        ({"teacher_model": "shallow"}, "--budget 2: the teacher has 3 layers and the student 4"),
        ({"seq_length": 500}, "--seq_length 500: the teacher can read 128 tokens at once"),
        ({"text_windows": 2}, "--text_windows 2: expected at least 3"),
    ],
)
def test_what_cannot_be_used_is_one_line(models, changes, words):
    changes = {name: models / value if isinstance(value, str) else value for name, value in changes.items()}
    options = {"budget": changes.pop("budget", 2), "output": models / "nowhere"}
    argv = command(models)
    for name, value in {**options, **changes}.items():
        while f"--{name}" in argv:
            at = argv.index(f"--{name}")
            del argv[at : at + 2]
        argv += [] if value is None else [f"--{name}", str(value)]
    if changes.get("teacher_model"):
        (models / "shallow" / "tokenizer.json").write_bytes((models / "teacher" / "tokenizer.json").read_bytes())
    assert words in refusal(argv)
    assert not (models / "nowhere").exists()


def test_heads_need_something_that_says_which(models):
    argv = [*command(models, head_budget=2), "--no_ablation"]
    assert "--head_budget 2 --no_ablation: nothing says which; give --head_choice search" in refusal(argv)
    assert parse_choose_args([*argv, "--head_choice", "search"]).head_budget == 2


def test_a_student_of_the_hub_has_no_folder_to_write_into(models, monkeypatch):
    """Its files may be in the cache all the same, where nobody looks for a choice."""
    monkeypatch.setattr(checks, "locate_model", lambda flag, name, *_: str(models / Path(name).name))
    argv = command(models, student_model="org/student")
    assert "--output: is missing; --student_model org/student is no folder" in refusal(argv)


def test_layers_are_no_option_here(models):
    with pytest.raises(ValueError, match="--layers"):
        parse_choose_args([*command(models), "--layers", "1"])


def test_a_folder_with_rows_of_nobody_is_left_alone(models, tmp_path):
    (tmp_path / "measured.jsonl").write_text("{}\n")
    assert "has files of a choice, but no settings.json" in refusal(command(models, tmp_path))
    assert (tmp_path / "measured.jsonl").read_text() == "{}\n"


def test_a_result_that_cannot_be_written_is_one_line_and_its_rows_are_kept(models, tmp_path):
    (tmp_path / "choice.svg").mkdir()
    codes, log = run(command(models, tmp_path))
    [line] = [line for line in log.splitlines() if line.startswith("error:")]
    assert codes == [2] and f"--output {tmp_path}: cannot be written" in line and "what was measured is kept" in line
    (tmp_path / "choice.svg").rmdir()
    rows = (tmp_path / "measured.jsonl").read_bytes()
    codes, log = run(command(models, tmp_path))
    assert codes == [0] and (tmp_path / "measured.jsonl").read_bytes() == rows


def test_the_plan_reads_no_weights(models, tmp_path, capsys):
    assert choose_layers.main(parse_choose_args([*command(models, tmp_path), "--dry_run"])) == 0
    printed = capsys.readouterr().out
    assert "Keeps 2 of 4 layers;" in printed and "tokens forward" in printed and "GB" in printed
    assert not list(tmp_path.iterdir())


def test_the_text_is_the_presets(models):
    args = parse_choose_args(["--preset", "tiny", "--budget", "2"])
    assert args.text == str(ROOT / "presets" / "tiny" / "text" / "heldout.jsonl") and args.text_split == "train"
    args = parse_choose_args(["--budget", "2"])
    assert (args.text, args.text_subset) == ("HuggingFaceFW/fineweb-edu", "CC-MAIN-2014-49")
    assert parse_choose_args(["--budget", "2", "--text", "mine.jsonl"]).text_subset is None
