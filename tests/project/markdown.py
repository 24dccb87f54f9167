"""Reads Markdown files of the project, and checks what they say against the code: links, options, commands, names of
files and of what is in them, make targets, formulas. A check takes a file's name and text and returns its problems.
"""

import ast
import dataclasses
import functools
import json
import re
import shlex
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from arguments import EvalArguments, TrainArguments, parse_eval_args, parse_train_args
from conversion.options import MakeArguments, parse_make_args
from inputs.option_values import PRESETS
from selection.options import ChooseArguments, parse_choose_args

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = "README.md", "README.zh-CN.md"
SCRIPTS: dict[str, tuple[type, Callable, str]] = {
    "train_gpus.py": (TrainArguments, parse_train_args, "train"),
    "eval_mmlu_hybrid.py": (EvalArguments, parse_eval_args, "eval"),
    "make_student.py": (MakeArguments, parse_make_args, "common"),
    "choose_layers.py": (ChooseArguments, parse_choose_args, "common"),
}
LAUNCHER = {"--standalone", "--nproc_per_node", "--master_port", "--master_addr", "--nnodes", "--node_rank"}
LAUNCHER |= {"--max-restarts", "--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}
DOCKER = {"--ipc"}
WRITTEN_BY_A_RUN = str(ROOT / "configs" / "production.yaml")  # stands in for the args.yaml of a run
ROOMS = sorted(folder.name for folder in ROOT.iterdir() if (folder / "__init__.py").is_file())
FOLDERS = [*ROOMS, "presets", "tests", "benchmarks", "docs", "configs", ".github", ".ci"]
FIELDS = {"layer_map.own", "layer_map.stream", "alignment.layers", "alignment.errors"}  # of metrics.jsonl
NO_MEMBERS = FIELDS | {"data.tar", "__init__.py"}
OURS = re.compile(rf"[a-z][\w-]*\.(py|toml)|requirements[\w-]*\.txt|({'|'.join(map(re.escape, FOLDERS))})/[\w./-]*")


# --- reading -------------------------------------------------------------------------------------------------


def read(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(text: str) -> list[tuple[str, str]]:
    """Returns (language, content) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def inline_code(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", prose(text))


def commands(text: str) -> Iterator[list[str]]:
    """Lines of the bash blocks, continued lines joined, as lists of words up to a redirection."""
    for language, content in blocks(text):
        if language == "bash":
            for line in content.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                ends = [words.index(word) for word in (">", ">>", "&") if word in words]
                if words:
                    yield words[: min(ends, default=len(words))]


def table(script: str, text: str) -> list[tuple[str, str]]:
    """Returns (option, default) of each row below a header that names the script."""
    rows, inside = [], False
    for line in prose(text).splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
        inside = bool(cells) and (inside or cells[0] == script)
        if inside and cells[0] != script and not set(cells[0]) <= set("-"):
            rows.append((cells[0].strip("`"), cells[1]))
    return rows


def anchors(text: str) -> set[str]:
    """Names of the headings, by GitHub's rule."""
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --- the code ------------------------------------------------------------------------------------------------


def option_names(script: str) -> set[str]:
    return {f"--{field.name}" for field in dataclasses.fields(SCRIPTS[script][0]) if field.metadata}


def defaults(script: str) -> dict[str, str]:
    """Returns defaults as tables show them: a preset's with an asterisk, switches as on or off, None as a dash."""
    _, parse, section = SCRIPTS[script]
    preset = json.loads((PRESETS / "llamba-8b" / "preset.json").read_text())
    starred = {**preset["common"], **preset[section]}
    values = dataclasses.asdict(parse([]))

    def shown(name: str) -> str:
        value = values[name]
        if value is None or value == []:
            return "–"
        words = {True: "on", False: "off"}[value] if isinstance(value, bool) else value
        words = " ".join(map(str, words)) if isinstance(words, list) else str(words)
        return f"`{words}`" + ("\\*" if name in starred else "")

    return {option: shown(option[2:]) for option in option_names(script)}


@functools.cache
def known_options() -> set[str]:
    """Returns the options of both scripts, of torchrun, and of every program here that has a parser of its own."""
    known = {name for script in SCRIPTS for name in option_names(script)} | LAUNCHER | DOCKER | {"--help"}
    for file in [*ROOT.glob("*.py"), *ROOT.glob("[!.]*/**/*.py")]:
        known |= set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', file.read_text(encoding="utf-8")))
    return known | {name.replace("--", "--no_", 1) for name in known}


@functools.cache
def definitions() -> dict[str, set[str]]:
    """Returns the names that each module or class of the product defines; modules of one name are taken together."""
    found: dict[str, set[str]] = {}
    for file in [*ROOT.glob("*.py"), *(file for room in ROOMS for file in (ROOT / room).rglob("*.py"))]:
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found.setdefault(file.stem, set()).update(defined_in(tree))
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(defined_in(node))
    return found


def defined_in(node: ast.Module | ast.ClassDef) -> set[str]:
    names = set()
    for statement in node.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, ast.AnnAssign):
            names.add(ast.unparse(statement.target))
        elif isinstance(statement, ast.Assign):
            leaves = [leaf for target in statement.targets for leaf in ast.walk(target)]
            names |= {leaf.id for leaf in leaves if isinstance(leaf, ast.Name)}
        elif isinstance(statement, ast.ImportFrom):
            names |= {alias.asname for alias in statement.names if alias.asname == alias.name}  # handed on
    return names


# --- checks --------------------------------------------------------------------------------------------------


def link_problems(name: str, text: str) -> list[str]:
    found = []
    for link in re.findall(r"(?:\]\(|src=\")([^)\"\s]+)", prose(text)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists():
            found.append(f"{link} is not there")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8") if path else text):
            found.append(f"{link}: no such heading")
    return found


def option_problems(name: str, text: str) -> list[str]:
    """Options named in sentences: `--layers`, `--no_freeze_mlp`, `--teacher_device cuda:0`."""
    named = re.findall(r"--[\w-]+", " ".join(inline_code(text)))
    return [f"{option} is no option" for option in named if option not in known_options()]


def command_problems(name: str, text: str) -> list[str]:
    found = []
    for language, content in blocks(text):
        if language == "bash":
            parsed = subprocess.run(["bash", "-n"], input=content, text=True, capture_output=True, check=False)
            found += [f"bash: {parsed.stderr.strip()}"] if parsed.returncode else []
    for words in commands(text):
        scripts = [word for word in words if word.endswith(".py")]
        found += [f"{script} is not there" for script in scripts if not (ROOT / script).exists()]
        if scripts and scripts[0] in SCRIPTS:
            argv = [word.replace("DIR/args.yaml", WRITTEN_BY_A_RUN) for word in words[words.index(scripts[0]) + 1 :]]
            try:
                SCRIPTS[scripts[0]][1](argv)
            except ValueError as error:
                found.append(f"{scripts[0]} {' '.join(argv)}: {error}")
        if scripts and "torchrun" in words:
            options = {word.split("=")[0] for word in words[words.index("torchrun") + 1 : words.index(scripts[0])]}
            found += [f"torchrun {option} is not known here" for option in sorted(options - LAUNCHER)]
    return found


def target_problems(name: str, text: str) -> list[str]:
    targets = set(re.findall(r"^([\w-]+):(?!=)", read("Makefile"), re.MULTILINE))
    lines = [*(" ".join(words) for words in commands(text)), *inline_code(text)]
    named = {target for line in lines for target in re.findall(r"(?:^| )make ([\w-]+)", line)}
    return [f"make {target} is no target" for target in sorted(named - targets)]


def name_problems(name: str, text: str) -> list[str]:
    """Files in code style, and what is in them: `losses.shared_vocab`, `Ranks.maximum`."""
    found = []
    for code in inline_code(text):
        if OURS.fullmatch(code):
            found += [] if (ROOT / code).exists() else [f"{code} is not there"]
        elif code not in NO_MEMBERS and (match := re.fullmatch(r"(\w+)\.(\w+)(\(.*\))?", code)):
            owner, member = match[1], match[2]
            if owner in definitions() and member not in definitions()[owner]:
                found.append(f"{owner} has no {member}")
    return found


def math_problems(name: str, text: str) -> list[str]:
    """Returns formulas that GitHub does not show. Outside of blocks, Markdown drops a backslash before punctuation."""
    found = []
    lines = re.sub(r"`[^`\n]+`", "", prose(text))
    for paragraph in re.split(r"\n\s*\n", lines):
        if paragraph.count("$") % 2:
            found.append(f"a lone $ in {paragraph.strip()[:60]!r}")
    inline = re.findall(r"\$([^$]+)\$", lines)
    found += [f"{formula}: belongs into a block" for formula in inline if re.search(r"\\[^A-Za-z\s]", formula)]
    for formula in [*inline, *(content for language, content in blocks(text) if language == "math")]:
        bare = re.sub(r"\\[{}]", "", formula)
        ends = [sorted(re.findall(rf"\\{word}\{{(\w+)\}}", formula)) for word in ("begin", "end")]
        if bare.count("{") != bare.count("}") or ends[0] != ends[1]:
            found.append(f"{formula.strip()[:60]!r}: what is opened is not closed")
        if formula.count(r"\left") - formula.count(r"\leftarrow") != formula.count(r"\right"):
            found.append(f"{formula.strip()[:60]!r}: \\left without \\right")
    return found


CHECKS = (link_problems, option_problems, command_problems, target_problems, name_problems, math_problems)
