"""Every Python from 3.10 to 3.13 that this machine has can compile the sources and parse the options. `make
test-pythons` installs everything for each and trains, which takes gigabytes.
"""

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
    folders = [
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
        "benchmarks",
        "tests",
        "presets",
    ]
    command = [python, "-m", "compileall", "-q", "-f", *map(str, ROOT.glob("*.py")), *folders]
    run = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "PYTHONPYCACHEPREFIX": str(tmp_path)}, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stdout + run.stderr
    assert len(list(tmp_path.rglob("*.pyc"))) > 100


def test_options_are_parsed(python, tmp_path):
    """They need one package, which is the only one given to it."""
    (tmp_path / "yaml").symlink_to(Path(yaml.__file__).parent)
    code = (
        "import arguments; a = arguments.parse_train_args(['--config', 'configs/8b-4gpus.yaml']); print(a.batch_size)"
    )
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "PYTHONDONTWRITEBYTECODE": "1"}
    run = subprocess.run([python, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, "2\n"), run.stderr
