"""The READMEs: their option table, the commands that they must have, their length, and that both languages agree.
Links, options, commands and names in them are checked with those of docs/ in test_docs.py.
"""

import re

import pytest

from tests.project.markdown import CHINESE, ENGLISH, blocks, commands, defaults, prose, read, table

LONG_RUN = "train_gpus.py --config configs/production.yaml --output_dir DIR --wandb_run_name NAME --resume auto"
PRODUCTION = (
    "torchrun --standalone --nproc_per_node=4 --master_port=29543 train_gpus.py "
    "--dtype bfloat16 --layers 14 16 17 30 --batch_size 2 --ce_weight 1.0 --kl_weight 0.1 --epochs 1 "
    "--max_steps 100000 --seq_length 1024 --freeze_mlp --freeze_replaced_layers --no_dataset_streaming "
    "--local_files_only --save_interval 1000 --wandb --wandb_project llamba-distill "
    "--wandb_run_name NAME --output_dir DIR"
)


@pytest.fixture(params=[ENGLISH, CHINESE])
def readme(request):
    return read(request.param)


def table_problems(text):
    rows, expected = table("train_gpus.py", text), defaults("train_gpus.py")
    found = [f"{name} is no option" for name, _ in rows if name not in expected]
    found += [
        f"{name} has default {expected[name]}, not {default}"
        for name, default in rows
        if name in expected and default != expected[name]
    ]
    names = [name for name, _ in rows]
    return found + [f"{name} is there twice" for name in sorted(set(names)) if names.count(name) > 1]


def difference_problems(english, chinese):
    found = []
    levels = [re.findall(r"^(#+) ", prose(text), re.MULTILINE) for text in (english, chinese)]
    if levels[0] != levels[1]:
        found.append(f"headings differ: {len(levels[0])} and {len(levels[1])}, or their levels")
    if blocks(english) != blocks(chinese):
        found.append("code blocks differ")
    if table("train_gpus.py", english) != table("train_gpus.py", chinese):
        found.append("the option tables differ")
    if re.findall(r"\]\((\w[^)]+)\)", english)[1:] != re.findall(r"\]\((\w[^)]+)\)", chinese)[1:]:
        found.append("links differ")  # but for the first, to the other language
    return found


def test_the_option_table_is_true(readme):
    assert table_problems(readme) == []
    assert 14 <= len(table("train_gpus.py", readme)) <= 20


def test_a_readme_is_short_and_has_its_commands(readme):
    assert len(readme.splitlines()) <= 180
    lines = [" ".join(words) for words in commands(readme)]
    assert {"make demo", "make test", "python report.py DIR"} <= set(lines)
    assert any(LONG_RUN in line for line in lines) and any("eval_mmlu_hybrid.py" in line for line in lines)
    assert "`make lint`" in readme


def test_both_languages_say_the_same():
    assert difference_problems(read(ENGLISH), read(CHINESE)) == []


def test_the_long_run_without_a_file_is_in_the_docs_word_for_word():
    assert any(PRODUCTION in " ".join(words) for words in commands(read("docs/scaling.md")))


@pytest.mark.parametrize(
    "old,new,problem",
    [
        ("| `--max_lr` | `1e-05` |", "| `--max_lr` | `1e-04` |", "--max_lr has default `1e-05`"),
        ("| `--batch_size` |", "| `--batch_sise` |", "--batch_sise is no option"),
    ],
)
def test_a_wrong_row_of_the_table_is_seen(readme, old, new, problem):
    assert old in readme
    assert any(problem in found for found in table_problems(readme.replace(old, new)))


@pytest.mark.parametrize(
    "old,new,problem",
    [("\n## ", "\n### ", "headings differ"), ("tail -f NAME.log", "tail NAME.log", "code blocks differ")],
)
def test_a_difference_between_the_languages_is_seen(old, new, problem):
    chinese = read(CHINESE)
    assert old in chinese
    assert problem in difference_problems(read(ENGLISH), chinese.replace(old, new, 1))[0]
