"""What doctor.py finds about Python and packages."""

import ast
import sys
from pathlib import Path

import doctor
from preflight.checks import basics
from preflight.checks.basics import FAILURE, OK, WARNING
from tests.preflight.cases import found, statuses


def test_an_old_python_can_read_the_first_checks(monkeypatch):
    for module in (doctor, basics):
        ast.parse(Path(module.__file__).read_text(), feature_version=(3, 8))
    monkeypatch.setattr(sys, "version_info", (3, 9, 1))
    (finding,) = basics.check_python()
    assert finding.status == FAILURE and "expected 3.10 or newer" in finding.found and "PYTHON=" in finding.remedy


def test_packages_are_compared_with_the_requirements(tmp_path, monkeypatch):
    file = tmp_path / "requirements.txt"
    lines = ["# a comment", "", "-r other.txt", "torch==99.0", "numpy>=1.0", "no-such-thing==1.0", "wandb==0.31.0"]
    file.write_text("\n".join([*lines, 'never==1.0; python_version < "3"']))
    version = basics.metadata.version

    def without_wandb(name):
        return version("no-such-thing" if name == "wandb" else name)

    monkeypatch.setattr(basics.metadata, "version", without_wandb)
    torch_, numpy_, missing, wandb_ = basics.check_packages(file)
    assert torch_.status == WARNING and "tested with 99.0" in torch_.found and 'install "torch==99.0"' in torch_.remedy
    assert numpy_.status == OK
    assert missing.status == FAILURE and 'install "no-such-thing==1.0"' in missing.remedy
    assert wandb_.status == WARNING and "needed for --wandb" in wandb_.found
    monkeypatch.setitem(basics.OLDEST, "torch", "98.0")
    assert next(basics.check_packages(file)).status == FAILURE


def test_a_local_build_of_the_tested_version_is_that_version(tmp_path, monkeypatch):
    (tmp_path / "requirements.txt").write_text("torch==2.13.0")
    monkeypatch.setattr(basics.metadata, "version", lambda _: "2.13.0+cu130")
    assert statuses(basics.check_packages(tmp_path / "requirements.txt")) == [OK]


def test_a_package_that_cannot_be_imported(tmp_path, monkeypatch):
    (tmp_path / "broken_package.py").write_text("raise OSError('libcudart.so: cannot open')")
    monkeypatch.syspath_prepend(tmp_path)
    (finding,) = basics.check_imports(("json", "broken_package", "not_there_1"))
    assert finding.status == FAILURE
    assert "broken_package (OSError: libcudart.so: cannot open); not_there_1 (no module not_there_1)" in finding.found
    assert list(basics.check_imports(("json",))) == []


def test_a_missing_optional_package_is_ok():
    findings = found(basics.check_optional_packages)
    assert set(statuses(findings)) == {OK} and "not needed" in findings[-1].found
