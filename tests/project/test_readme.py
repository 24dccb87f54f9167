"""The READMEs against the code: option tables, commands, files, make targets, and that both languages agree. Each
check returns what is wrong with a text; it is run on the READMEs, and on copies spoilt on purpose, to show that it
sees the damage.
"""

import dataclasses
import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from arguments import EvalArguments, TrainArguments, parse_eval_args, parse_train_args
from inputs.options import PRESETS

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
SCRIPTS: dict[str, tuple[type, Callable, str]] = {
    "train_gpus.py": (TrainArguments, parse_train_args, "train"),
    "eval_mmlu_hybrid.py": (EvalArguments, parse_eval_args, "eval"),
}
WRITTEN_BY_A_RUN = str(ROOT / "configs" / "production.yaml")  # what stands in for the args.yaml of one
PRODUCTION = (
    "torchrun --standalone --nproc_per_node=4 --master_port=29543 train_gpus.py "
    "--dtype bfloat16 --layers 14 16 17 30 --batch_size 2 --ce_weight 1.0 --kl_weight 0.1 --epochs 1 "
    "--max_steps 100000 --seq_length 1024 --freeze_mlp --freeze_replaced_layers --no_dataset_streaming "
    "--local_files_only --save_interval 1000 --wandb --wandb_project llamba-distill "
    "--wandb_run_name NAME --output_dir DIR"
)
OF_TORCHRUN = {"--standalone", "--nproc_per_node", "--master_port", "--master_addr", "--nnodes", "--node_rank"}
OF_TORCHRUN |= {"--max-restarts"}


@pytest.fixture(params=[ENGLISH, CHINESE])
def readme(request):
    return read(request.param)


def read(name):
    return (ROOT / name).read_text(encoding="utf-8")


# --- reading a README ----------------------------------------------------------------------------------------


def blocks(text):
    """(language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text):
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text):
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands(text):
    """Lines of the bash blocks, continued lines joined, as lists of words up to a redirection."""
    for language, content in blocks(text):
        if language == "bash":
            for line in content.replace("\\\n", " ").splitlines():
                words = shlex.split(line)
                ends = [words.index(word) for word in (">", ">>", "&") if word in words]
                yield words[: min(ends, default=len(words))]


def arguments_of(script, text):
    return [words[words.index(script) + 1 :] for words in commands(text) if script in words]


def table(script, text):
    """(option, default) of each row below a header that names the script."""
    rows, inside = [], False
    for line in prose(text).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        inside = bool(cells) and (inside or cells[0] == script)
        if inside and cells[0] != script and not set(cells[0]) <= set("-"):
            rows.append((cells[0].strip("`"), cells[1]))
    return rows


# --- checks --------------------------------------------------------------------------------------------------


def option_names(script):
    return {f"--{field.name}" for field in dataclasses.fields(SCRIPTS[script][0]) if field.metadata}


def defaults(script):
    """As a table shows them: a preset's value with an asterisk, switches as on or off, nothing as a dash."""
    _, parse, section = SCRIPTS[script]
    preset = json.loads((PRESETS / "llamba-8b" / "preset.json").read_text())
    starred = {**preset["common"], **preset[section]}
    values = dataclasses.asdict(parse([]))

    def shown(name):
        value = values[name]
        if value is None or value == []:
            return "–"
        words = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
        words = " ".join(map(str, words)) if isinstance(words, list) else str(words)
        return f"`{words}`" + ("\\*" if name in starred else "")

    return {option: shown(option[2:]) for option in option_names(script)}


def table_problems(text):
    found = []
    for script in SCRIPTS:
        rows, expected = table(script, text), defaults(script)
        found += [f"{script}: {name} is missing" for name in sorted(set(expected) - {name for name, _ in rows})]
        found += [f"{script}: {name} is no option" for name, _ in rows if name not in expected]
        found += [
            f"{script}: {name} has default {expected[name]}, not {default}"
            for name, default in rows
            if name in expected and default != expected[name]
        ]
        found += [f"{script}: {row[0]} stands twice" for i, row in enumerate(rows) if row in rows[:i]]
    return found


def command_problems(text):
    found = []
    for script, (_, parse, _) in SCRIPTS.items():
        given = arguments_of(script, text)
        if not given:
            found.append(f"no command runs {script}")
        for argv in given:
            argv = [word.replace("DIR/args.yaml", WRITTEN_BY_A_RUN) for word in argv]
            try:
                parse(argv)
            except ValueError as error:
                found.append(f"{script} {' '.join(argv)}: {error}")
    for words in commands(text):
        if "torchrun" in words:
            launched = next((i for i, word in enumerate(words) if word.endswith(".py")), len(words))
            launcher = words[words.index("torchrun") + 1 : launched]
            options = {word.split("=")[0] for word in launcher}
            found += [f"torchrun {option} is not known here" for option in sorted(options - OF_TORCHRUN)]
    if not any(PRODUCTION in " ".join(words) for words in commands(text)):
        found.append("the production command is not there word for word")
    return found


def option_problems(text):
    """Options named in sentences: `--layers`, `--no_freeze_mlp`, `--teacher_device cuda:0`."""
    known = option_names("train_gpus.py") | option_names("eval_mmlu_hybrid.py") | OF_TORCHRUN | {"--help"}
    for file in ("benchmarks/harness.py", "doctor.py", "report.py"):
        known |= set(re.findall(r'add_argument\("(--\w+)"', (ROOT / file).read_text()))
    known |= {name.replace("--", "--no_") for name in known}
    named = re.findall(r"--[\w-]+", " ".join(inline_code(text)))
    return [f"{name} is no option" for name in named if name not in known]


def file_problems(text):
    """Links to files, and names in code style of files that belong to the repository."""
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    ours = r"[\w.-]+\.(py|toml)|requirements[\w-]*\.txt|(presets|llamba|tests|benchmarks|docs)/[\w./-]*"
    names = [name for name in inline_code(text) if re.fullmatch(ours, name)]
    found = [f"{name} is not there" for name in links + names if not (ROOT / name).exists()]
    if not names:
        found.append("no file is named")
    return found


def target_problems(text):
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):(?!=)", makefile, re.MULTILINE))
    lines = [*(" ".join(words) for words in commands(text)), *inline_code(text)]
    named = {name for line in lines for name in re.findall(r"(?:^| )make ([\w-]+)", line)}
    found = [f"make {name} is no target" for name in sorted(named - targets)]
    return found + [f"make {name} is not named" for name in sorted({"demo", "test", "lint"} - named)]


def difference_problems(english, chinese):
    found = []
    levels = [re.findall(r"^(#+) ", prose(text), re.MULTILINE) for text in (english, chinese)]
    if levels[0] != levels[1]:
        found.append(f"headings differ: {len(levels[0])} and {len(levels[1])}, or their levels")
    code = [[block for block in blocks(text) if block[0] != "mermaid"] for text in (english, chinese)]
    if code[0] != code[1]:
        found.append(f"code blocks differ: {[a for a, b in zip(*code, strict=False) if a != b][:1]}")
    if len(blocks(english)) != len(blocks(chinese)):
        found.append("one has more code blocks")
    for script in SCRIPTS:
        if table(script, english) != table(script, chinese):
            found.append(f"the tables of {script} differ")
    return found


def link_problems(text):
    """Links to a heading of the same file, by GitHub's rule for their names."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
    return [f"#{name} is no heading" for name in re.findall(r"\]\(#([^)]+)\)", text) if name not in anchors]


CHECKS = (table_problems, command_problems, option_problems, file_problems, target_problems, link_problems)


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_the_readmes_are_true(readme, check):
    assert check(readme) == []


def test_both_languages_say_the_same():
    assert difference_problems(read(ENGLISH), read(CHINESE)) == []


# --- the checks see damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "check,old,new,problem",
    [
        (table_problems, "| `--max_lr` | `1e-05` |", "| `--max_lr` | `1e-04` |", "--max_lr has default `1e-05`"),
        (table_problems, "| `--grad_clip` |", "| `--grad_clop` |", "--grad_clop is no option"),
        (table_problems, "| `--grad_clip` |", "| `--grad_clop` |", "train_gpus.py: --grad_clip is missing"),
        (table_problems, "| `--ckpt` |", "| `--chkpt` |", "eval_mmlu_hybrid.py: --ckpt is missing"),
        (table_problems, "`1024`\\*", "`1024`", "--seq_length has default `1024`\\*"),
        (table_problems, "| `--dataset_streaming` | `on` |", "| `--dataset_streaming` | `off` |", "default `on`"),
        (command_problems, "--resume_step 5000", "--resume_stop 5000", "--resume_stop"),
        (command_problems, "--limit 20", "--limit 0", "--limit 0"),
        (command_problems, "--kl_weight 0.1 \\", "--kl_weight 0.2 \\", "word for word"),
        (command_problems, "eval_mmlu_hybrid.py --", "eval.py --", "no command runs eval_mmlu_hybrid.py"),
        (command_problems, "--node_rank=0", "--rank=0", "torchrun --rank is not known"),
        (option_problems, "`--wandb_mode offline`", "`--wandb_modus offline`", "--wandb_modus is no option"),
        (file_problems, "`llamba/kernels.py`", "`llamba/kernel.py`", "llamba/kernel.py is not there"),
        (file_problems, "`requirements-cuda.txt`", "`requirements-gpu.txt`", "requirements-gpu.txt is not there"),
        (target_problems, "make demo\n", "make demonstration\n", "make demonstration is no target"),
        (target_problems, "make lint", "make setup", "make lint is not named"),
        (link_problems, "](#", "](#not-", "is no heading"),
    ],
)
def test_a_check_sees_damage(readme, check, old, new, problem):
    assert old in readme
    assert any(problem in found for found in check(readme.replace(old, new)))


@pytest.mark.parametrize(
    "old,new,problem",
    [
        ("\n## ", "\n### ", "headings differ"),
        ("tail -f NAME.log", "tail NAME.log", "code blocks differ"),
        ("```mermaid", "```text\n```\n```mermaid", "one has more code blocks"),
        ("| `--seed` | `0` |", "| `--seed` | `1` |", "the tables of train_gpus.py differ"),
    ],
)
def test_a_difference_between_the_languages_is_seen(old, new, problem):
    chinese = read(CHINESE)
    assert old in chinese
    spoilt = chinese.replace(old, new, 1)
    assert any(problem in found for found in difference_problems(read(ENGLISH), spoilt))
