"""The whole campaign of faults, about ten minutes: `make faults`. Prints the table of docs/reliability.md and writes
all figures to runs/faults.json. Exits with 1 if a run lost something, damage went unnoticed, or an error was
unforeseen.
"""

import argparse
import datetime
import json
import os
import platform
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from tests.faults.damage import damage_checkpoints, damage_texts, make_checkpoint
from tests.faults.failing_saves import fail_saves
from tests.faults.kills import run_campaign


def parts(n: int, seed: int) -> dict[str, Callable[[Path], dict]]:
    """Returns the parts of the campaign, with `n` kills of each kind of run."""
    return {
        "kill -9, cached, 2 ranks": lambda folder: run_campaign(folder, "cached", 2, n, seed),
        "kill -9, cached, 3 ranks": lambda folder: run_campaign(folder, "cached", 3, n, seed + 1),
        "kill -9, stream, 2 ranks": lambda folder: run_campaign(folder, "stream", 2, n, seed + 2),
        "kill -9, owners, 3 ranks": lambda folder: run_campaign(folder, "owners", 3, n, seed + 3),
        "failing saves, 2 ranks": lambda folder: fail_saves(folder, n, random.Random(seed)),
        "damaged checkpoints": lambda folder: damage_checkpoints(
            make_checkpoint(folder), folder, 20 * n, random.Random(seed)
        ),
        "damaged texts": lambda folder: damage_texts(folder, 5 * n, random.Random(seed)),
    }


def lost(result: dict) -> list[str]:
    return [*result.get("differences", []), *result.get("missed", []), *result.get("unforeseen", [])]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=40, help="kills of each kind of run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, default=Path("runs/faults.json"))
    args = parser.parse_args()
    results: dict[str, dict] = {}
    for name, play in parts(args.n, args.seed).items():
        with tempfile.TemporaryDirectory() as folder:
            results[name] = play(Path(folder))
        tried = results[name].get("kills", results[name].get("tried"))
        print(f"| {name} | {tried} | {len(lost(results[name]))} |", flush=True)
    about = {"date": str(datetime.date.today()), "cores": os.cpu_count(), "python": platform.python_version()}
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**about, "seed": args.seed, "results": results}, indent=2) + "\n")
    return int(any(lost(result) for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
