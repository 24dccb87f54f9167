"""docs/, CONTRIBUTING.md, CHANGELOG.md and the forms under .github/ against the code: links, options, commands, names
of files and of what is in them, the map of modules, and formulas that GitHub can show. Each check returns what is wrong
with a text; it is run on the files, and on copies spoilt on purpose, to show that it sees the damage.
"""

import ast
import functools
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from tests.project.test_readme import (
    OF_TORCHRUN,
    ROOT,
    SCRIPTS,
    arguments_of,
    blocks,
    commands,
    inline_code,
    option_names,
    prose,
    read,
    target_problems,
)

MAP = "docs/architecture.md"
TEXTS = [
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
    *("CONTRIBUTING.md", "CHANGELOG.md", ".github/PULL_REQUEST_TEMPLATE.md"),
]
FORMS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FOLDERS = (
    "checkpointing",
    "distillation",
    "evaluation",
    "inputs",
    "llamba",
    "monitoring",
    "preflight",
    "processes",
    "report_page",
    "text",
    "presets",
    "tests",
    "benchmarks",
    "docs",
    "configs",
    ".github",
    ".ci",
)
OURS = re.compile(rf"[\w-]+\.(py|toml)|requirements[\w-]*\.txt|({'|'.join(map(re.escape, FOLDERS))})/[\w./-]*")
LAUNCHER = OF_TORCHRUN | {"--rdzv_backend", "--rdzv_endpoint", "--rdzv_id"}
FIELDS_OF_A_FORM = {"textarea", "input", "dropdown", "checkboxes", "markdown"}


# --- the code ------------------------------------------------------------------------------------------------


def sources():
    """The product's Python files."""
    return [*ROOT.glob("*.py"), *(ROOT / "llamba").glob("*.py")]


@functools.cache
def definitions():
    """Module or class -> the names that it defines; of classes of one name, all of theirs."""
    found = {}
    for file in sources():
        tree = ast.parse(file.read_text(encoding="utf-8"))
        found[file.stem] = defined_in(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                found.setdefault(node.name, set()).update(defined_in(node))
    return found


def defined_in(node):
    names = set()
    for statement in node.body:
        if isinstance(statement, (ast.FunctionDef, ast.ClassDef)):
            names.add(statement.name)
        elif isinstance(statement, ast.AnnAssign):
            names.add(ast.unparse(statement.target))
        elif isinstance(statement, ast.Assign):
            leaves = [leaf for target in statement.targets for leaf in ast.walk(target)]
            names |= {leaf.id for leaf in leaves if isinstance(leaf, ast.Name)}
    return names


@functools.cache
def known_options():
    """Of both scripts, and of every program here that has a parser of its own."""
    known = {name for script in SCRIPTS for name in option_names(script)} | LAUNCHER | {"--help"}
    for file in ROOT.glob("[!.]*/**/*.py"):
        known |= options_of_parsers(file)
    for file in ROOT.glob("*.py"):
        known |= options_of_parsers(file)
    return known | {name.replace("--", "--no_", 1) for name in known}


def options_of_parsers(file):
    return set(re.findall(r'add_argument\(\s*"(--[\w-]+)"', file.read_text(encoding="utf-8")))


def units():
    """What the map has a line for: modules of the root and of llamba, and other folders with Python files."""
    files = [file.relative_to(ROOT).as_posix() for file in sources()]
    folders = {path.parts[len(ROOT.parts)] for path in ROOT.glob("[!.]*/*.py")}
    return [*files, *(f"{folder}/" for folder in sorted(folders - {"llamba"}))]


# --- checks: (name of the file, its text) -> problems --------------------------------------------------------


def anchors(text):
    headings = re.findall(r"^#+ (.+)$", prose(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def link_problems(name, text):
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(text)):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        file = (ROOT / name).parent / path if path else ROOT / name
        if not file.exists():
            found.append(f"{link} is not there")
        elif anchor and anchor not in anchors(file.read_text(encoding="utf-8") if path else text):
            found.append(f"{link}: no such heading")
    return found


def option_problems(name, text):
    named = re.findall(r"--[\w-]+", " ".join(inline_code(text)))
    return [f"{option} is no option" for option in named if option not in known_options()]


def command_problems(name, text):
    found = []
    for script, (_, parse, _) in SCRIPTS.items():
        for argv in arguments_of(script, text):
            try:
                parse(argv)
            except ValueError as error:
                found.append(f"{script} {' '.join(argv)}: {error}")
    for language, content in blocks(text):
        if language == "bash":
            parsed = subprocess.run(["bash", "-n"], input=content, text=True, capture_output=True, check=False)
            found += [f"bash: {parsed.stderr.strip()}"] if parsed.returncode else []
    for words in commands(text):
        scripts = [word for word in words if word.endswith(".py")]
        found += [f"{script} is not there" for script in scripts if not (ROOT / script).exists()]
        if "torchrun" in words and scripts:
            given = words[words.index("torchrun") + 1 : words.index(scripts[0])]
            options = {word.split("=")[0] for word in given}
            found += [f"torchrun {option} is not known here" for option in sorted(options - LAUNCHER)]
    return found + [problem for problem in target_problems(text) if problem.endswith("is no target")]


def name_problems(name, text):
    """Files in code style, and what is in them: `losses.shared_vocab`, `Ranks.maximum`."""
    found = []
    for code in inline_code(text):
        if OURS.fullmatch(code):
            found += [] if (ROOT / code).exists() else [f"{code} is not there"]
        elif match := re.fullmatch(r"(\w+)\.(\w+)(\(.*\))?", code):
            owner, member = match[1], match[2]
            if owner in definitions() and member not in definitions()[owner]:
                found.append(f"{owner} has no {member}")
    return found


def math_problems(name, text):
    """What GitHub does not show as a formula: Markdown takes the backslash from \\, and the like outside of blocks."""
    found = []
    lines = re.sub(r"`[^`\n]+`", "", prose(text))
    for paragraph in re.split(r"\n\s*\n", lines):
        if paragraph.count("$") % 2:
            found.append(f"a lone $ in {paragraph.strip()[:60]!r}")
    for formula in re.findall(r"\$([^$]+)\$", lines):
        if re.search(r"\\[^A-Za-z\s]", formula):
            found.append(f"{formula}: belongs into a block")
    formulas = [content for language, content in blocks(text) if language == "math"]
    for formula in [*formulas, *re.findall(r"\$([^$]+)\$", lines)]:
        bare = re.sub(r"\\[{}]", "", formula)
        ends = [re.findall(rf"\\{word}\{{(\w+)\}}", formula) for word in ("begin", "end")]
        if bare.count("{") != bare.count("}") or sorted(ends[0]) != sorted(ends[1]):
            found.append(f"{formula.strip()[:60]!r}: what is opened is not closed")
        if formula.count(r"\left") - formula.count(r"\leftarrow") != formula.count(r"\right"):
            found.append(f"{formula.strip()[:60]!r}: \\left without \\right")
    return found


CHECKS = (link_problems, option_problems, command_problems, name_problems, math_problems)


def map_problems(text):
    """The first cells of the map's rows, as names, against the files."""
    section = re.search(r"^## The map$(.*?)^\*\*", text, re.MULTILINE | re.DOTALL)
    rows = re.findall(r"^\| `([^`]+)` \|", section[1] if section else "", re.MULTILINE)
    found = [f"{unit} has no line" for unit in units() if unit not in rows]
    found += [f"{row} is not there" for row in rows if row not in units()]
    return found + [f"{row} stands twice" for row in sorted(set(rows)) if rows.count(row) > 1]


def form_problems(name, text):
    """A form that GitHub would refuse or leave out."""
    try:
        form = yaml.safe_load(text)
    except yaml.YAMLError as error:
        return [f"{name}: {error}"]
    if Path(name).stem == "config":
        return [] if isinstance(form.get("blank_issues_enabled"), bool) else [f"{name}: says nothing"]
    found = [f"{name}: no {key}" for key in ("name", "description", "body") if not form.get(key)]
    fields = form.get("body") or []
    ids = [field.get("id") for field in fields]
    found += [f"{name}: {field.get('type')} is no field" for field in fields if field["type"] not in FIELDS_OF_A_FORM]
    found += [f"{name}: a field without a label" for field in fields if not field.get("attributes", {}).get("label")]
    found += [f"{name}: the id {id} stands twice" for id in sorted({id for id in ids if ids.count(id) > 1})]
    if not any(field.get("validations", {}).get("required") for field in fields):
        found.append(f"{name}: asks for nothing")
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", TEXTS)
def test_the_documents_are_true(name, check):
    assert check(name, read(name)) == []


def test_every_module_has_its_line_in_the_map():
    assert map_problems(read(MAP)) == []
    assert {"train_gpus.py", "llamba/ssd.py", "tests/"} <= set(units())


@pytest.mark.parametrize("name", FORMS)
def test_forms_can_be_used(name):
    assert form_problems(name, read(name)) == []


def test_the_forms_ask_for_what_is_needed():
    bug = read(".github/ISSUE_TEMPLATE/bug.yml")
    assert all(needed in bug for needed in ("command", "args.yaml", "log", "python doctor.py", "--preset tiny"))


def test_the_licence_is_apache_2_and_has_a_holder():
    licence = read("LICENSE")
    assert "Version 2.0, January 2004" in licence and "END OF TERMS AND CONDITIONS" in licence
    assert "Copyright 2026 The Hybrid Distillation authors" in licence and "[yyyy]" not in licence


# --- the checks see damage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name,check,old,new,problem",
    [
        (MAP, link_problems, "(reliability.md)", "(reliable.md)", "reliable.md is not there"),
        (MAP, link_problems, "distillation.md#adamw", "distillation.md#adam-w", "no such heading"),
        ("docs/performance.md", link_problems, "(#the-teacher)", "(#a-teacher)", "#a-teacher: no such heading"),
        (MAP, option_problems, "`--no_master_weights`", "`--no_master_weight`", "--no_master_weight is no option"),
        ("docs/performance.md", option_problems, "--rounds", "--round", "--round is no option"),
        ("docs/scaling.md", command_problems, "--time_limit 1400", "--time_limit -1", "--time_limit"),
        ("docs/scaling.md", command_problems, "--rdzv_backend", "--rdzv_back", "torchrun --rdzv_back is not known"),
        ("docs/scaling.md", command_problems, "; fi\n", "\n", "bash: "),
        ("docs/scaling.md", command_problems, "configs/8b-8gpus.yaml", "configs/9b.yaml", "configs/9b.yaml"),
        ("CONTRIBUTING.md", command_problems, "make setup-dev", "make set-up", "make set-up is no target"),
        (
            "CONTRIBUTING.md",
            command_problems,
            "pytest tests/distillation/test_losses.py",
            "pytest tests/l.py",
            "not there",
        ),
        ("CONTRIBUTING.md", name_problems, "`arguments.py`", "`options.py`", "options.py is not there"),
        (MAP, name_problems, "`losses._chunk_losses`", "`losses._chunks`", "losses has no _chunks"),
        (MAP, name_problems, "`Ranks.maximum`", "`Ranks.highest`", "Ranks has no highest"),
        ("docs/scaling.md", name_problems, "`configs/production.yaml`", "`configs/long.yaml`", "not there"),
        ("docs/distillation.md", math_problems, "$Q$", "$Q", "a lone $"),
        ("docs/distillation.md", math_problems, r"$\eta_k$", r"$\eta\,k$", "belongs into a block"),
        ("docs/distillation.md", math_problems, r"\end{cases}", "", "what is opened is not closed"),
        ("docs/distillation.md", math_problems, r"W_s^{\top}", r"W_s^{\top", "what is opened is not closed"),
    ],
)
def test_a_check_sees_damage(name, check, old, new, problem):
    text = read(name)
    assert old in text
    assert any(problem in found for found in check(name, text.replace(old, new)))


@pytest.mark.parametrize(
    "old,new,problem",
    [
        ("| `llamba/ssd.py` |", "| `llamba/scan.py` |", "llamba/ssd.py has no line"),
        ("| `llamba/ssd.py` |", "| `llamba/scan.py` |", "llamba/scan.py is not there"),
        ("| `saver.py` |", "| `resume.py` |", "resume.py stands twice"),
        ("| `benchmarks/` |", "| benchmarks |", "benchmarks/ has no line"),
        ("## The map", "## A map", "train_gpus.py has no line"),
    ],
)
def test_a_hole_in_the_map_is_seen(old, new, problem):
    text = read(MAP)
    assert old in text
    assert problem in map_problems(text.replace(old, new))


@pytest.mark.parametrize(
    "old,new,problem",
    [
        ("name: Something is wrong", "title: Something is wrong", "no name"),
        ("type: textarea", "type: text", "text is no field"),
        ("label: What happened", "labels: What happened", "a field without a label"),
        ("id: log", "id: command", "the id command stands twice"),
        ("required: true", "required: false", "asks for nothing"),
        ("body:", "body: [", "bug.yml: while parsing"),
    ],
)
def test_a_broken_form_is_seen(old, new, problem):
    name = ".github/ISSUE_TEMPLATE/bug.yml"
    text = read(name)
    assert old in text
    assert any(problem in found for found in form_problems(name, text.replace(old, new)))
