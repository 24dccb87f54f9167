"""The whole installation and a short run on every Python from 3.10 to 3.13 that this machine has, each in a fresh
environment:

    python tests/pythons.py [3.12 ...]

Each needs 3 GB of downloads and 6 GB of disk while it runs, less where pip finds a CPU build of torch.
tests/project/test_pythons.py makes the checks that cost little. Uses the standard library only.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
RUN = "--preset tiny --max_steps 2 --seq_length 32 --batch_size 2 --eval_interval 2 --eval_windows 2 --tensorboard"


def interpreters() -> dict[str, Path]:
    """Returns the Pythons on the path and pyenv's, by version."""
    found: dict[str, Path] = {}
    pyenv = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in VERSIONS:
        places = [shutil.which(f"python{version}"), *sorted(pyenv.glob(f"{version}.*/bin/python{version}"))]
        for place in filter(None, places):  # a shim of pyenv fails where its version is not selected
            if subprocess.run([place, "-c", ""], capture_output=True).returncode == 0:
                found[version] = Path(place)
                break
    return found


def try_out(python: Path, folder: Path) -> None:
    """Installs what `make setup` does, trains, scores, exports and reports. Raises CalledProcessError if one fails."""
    venv = folder / "venv"
    subprocess.run([python, "-m", "venv", venv], check=True)
    requirements = ["-r", ROOT / "requirements.txt"]
    subprocess.run([venv / "bin" / "pip", "install", "--quiet", "--quiet", "--no-compile", *requirements], check=True)

    def run(*words: str | Path) -> None:
        environment = {**os.environ, "HF_HOME": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        subprocess.run([venv / "bin" / "python", *words], cwd=ROOT, env=environment, check=True)

    out = folder / "run"
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    run("train_gpus.py", "--preset", "tiny", "--dry_run", "--gpus", "3", "--gpu_gb", "24")
    run(*torchrun, "train_gpus.py", *RUN.split(), "--output_dir", out)
    score = ("--which", "hybrid_ft", "teacher", "--ckpt", out / "latest", "--limit", "2", "--output", out / "eval.json")
    run("eval_mmlu_hybrid.py", "--preset", "tiny", *score)
    run("-m", "llamba.export", out / "latest", folder / "exported")
    run("report.py", out)
    run("doctor.py", "--preset", "tiny", "--output_dir", folder / "other")


def main(versions: list[str]) -> int:
    failed = []
    for version, python in interpreters().items():
        if versions and version not in versions:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            try:
                try_out(python, Path(folder))
                outcome = "passed"
            except subprocess.CalledProcessError as error:
                failed.append(version)
                outcome = f"failed: {' '.join(map(str, error.cmd))}"
        print(f"Python {version}, {python}: {outcome}, {(time.monotonic() - began) / 60:.1f} min", flush=True)
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
