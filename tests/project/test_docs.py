"""The READMEs, docs/, CONTRIBUTING.md, CHANGELOG.md and the forms under .github/ against the code (markdown.py has the
checks). Each check is also run on texts that were spoilt on purpose, to show that it sees the damage.
"""

from pathlib import Path

import pytest
import yaml

from tests.project.markdown import (
    CHECKS,
    CHINESE,
    ENGLISH,
    ROOT,
    command_problems,
    link_problems,
    math_problems,
    name_problems,
    option_problems,
    read,
    target_problems,
)

TEXTS = [
    *(ENGLISH, CHINESE, "CONTRIBUTING.md", "CHANGELOG.md", ".github/PULL_REQUEST_TEMPLATE.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")),
]
FORMS = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))
FIELDS_OF_A_FORM = {"textarea", "input", "dropdown", "checkboxes", "markdown"}


def form_problems(name, text):
    """Returns why GitHub would refuse a form or leave it out."""
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
    found += [f"{name}: the id {id} is there twice" for id in sorted({id for id in ids if ids.count(id) > 1})]
    if not any(field.get("validations", {}).get("required") for field in fields):
        found.append(f"{name}: asks for nothing")
    return found


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("name", TEXTS)
def test_the_documents_are_true(name, check):
    assert check(name, read(name)) == []


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


@pytest.mark.parametrize(
    "name,check,old,new,problem",
    [
        ("docs/architecture.md", link_problems, "(reliability.md)", "(reliable.md)", "reliable.md is not there"),
        ("README.md", link_problems, "docs/logs.md#wb", "docs/logs.md#w-b", "no such heading"),
        ("README.zh-CN.md", option_problems, "`--no_freeze_mlp`", "`--no_freeze_mpl`", "--no_freeze_mpl is no option"),
        ("docs/performance.md", option_problems, "--rounds", "--round", "--round is no option"),
        ("docs/scaling.md", command_problems, "--time_limit 1400", "--time_limit -1", "--time_limit"),
        ("docs/scaling.md", command_problems, "; fi\n", "\n", "bash: "),
        ("README.md", target_problems, "make demo\n", "make demonstration\n", "make demonstration is no target"),
        ("CONTRIBUTING.md", target_problems, "make setup-dev", "make set-up", "make set-up is no target"),
        ("README.md", name_problems, "`train_gpus.py`", "`train.py`", "train.py is not there"),
        ("docs/architecture.md", name_problems, "`Ranks.maximum`", "`Ranks.highest`", "Ranks has no highest"),
        ("docs/distillation.md", math_problems, "$Q$", "$Q", "a lone $"),
        ("docs/distillation.md", math_problems, r"\end{cases}", "", "what is opened is not closed"),
    ],
)
def test_a_check_sees_damage(name, check, old, new, problem):
    text = read(name)
    assert old in text
    assert any(problem in found for found in check(name, text.replace(old, new)))


@pytest.mark.parametrize(
    "old,new,problem",
    [("type: textarea", "type: text", "text is no field"), ("body:", "body: [", "bug.yml: while parsing")],
)
def test_a_broken_form_is_seen(old, new, problem):
    name = ".github/ISSUE_TEMPLATE/bug.yml"
    text = read(name)
    assert old in text
    assert any(problem in found for found in form_problems(name, text.replace(old, new)))
