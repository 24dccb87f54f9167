"""Every Python from 3.10 to 3.13 that this machine has: that the sources are readable to it, the options work, and pip
finds all that requirements.txt lists. `make test-pythons` installs it all and trains, which takes gigabytes.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.pythons import ROOT, VERSIONS, interpreters

FOUND = interpreters()
THIS = f"{sys.version_info.major}.{sys.version_info.minor}"


@pytest.fixture(params=VERSIONS)
def python(request):
    if request.param not in FOUND:
        pytest.skip(f"there is no Python {request.param} here")
    return FOUND[request.param]


def test_this_python_is_found():
    assert THIS not in VERSIONS or THIS in FOUND


def test_sources_compile(python, tmp_path):
    folders = ["llamba", "checkup", "reporting", "benchmarks", "tests", "presets"]
    command = [python, "-m", "compileall", "-q", "-f", *map(str, ROOT.glob("*.py")), *folders]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(list(tmp_path.rglob("*.pyc"))) > 100


def test_options_are_parsed(python, tmp_path):
    """With the only package that takes."""
    (tmp_path / "yaml").symlink_to(Path(yaml.__file__).parent)
    code = (
        "import arguments; a = arguments.parse_train_args(['--config', 'configs/8b-4gpus.yaml']); print(a.batch_size)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([python, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "2\n"), run.stderr


@pytest.fixture(scope="module")
def resolved(tmp_path_factory):
    """What pip would install for each Python but this one, whose packages are here: report, errors, exit code. All at
    once, as they mostly wait.
    """
    folder, running = tmp_path_factory.mktemp("pip"), {}
    what = ("--only-binary=:all:", "--quiet", "-r", ROOT / "requirements.txt")
    for version, python in FOUND.items():
        if version != THIS:
            pip = (sys.executable, "-m", "pip", "--python", python, "install", "--dry-run", "--ignore-installed")
            command = [*pip, "--report", folder / version, *what]
            running[version] = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    errors = {version: process.communicate()[1] for version, process in running.items()}
    return {version: (folder / version, errors[version], running[version].returncode) for version in running}


@pytest.mark.parametrize("version", [version for version in VERSIONS if version != THIS])
def test_pip_finds_all_that_is_required(resolved, version):
    if version not in resolved:
        pytest.skip(f"there is no Python {version} here")
    report, errors, code = resolved[version]
    if code and "NewConnectionError" in errors:
        pytest.skip("pip reaches no package index")
    assert code == 0, errors[-3000:]
    found = [item["metadata"] for item in json.loads(report.read_text())["install"]]
    versions = {metadata["name"].lower(): metadata["version"] for metadata in found}
    assert versions["torch"].startswith("2.13.0")
    assert versions["transformers"].startswith("5.20" if version == "3.10" else "5.23")
