"""docs/options.md against the options that it is made from."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_page_is_what_the_options_give():
    command = [sys.executable, "list_options.py"]
    page = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, encoding="utf-8").stdout
    committed = (ROOT / "docs" / "options.md").read_text(encoding="utf-8")
    assert page == committed, "run: python list_options.py > docs/options.md"
