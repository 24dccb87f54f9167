"""Kills a run with `kill -9` again and again, at the moments of MOMENTS and at random times, and resumes it with
--resume auto each time. In the end it must equal an undisturbed run, bit by bit.

    python -m tests.faults.kills --kills 20 --lane cached --ranks 2
"""

import argparse
import json
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

from tests.faults.compare import differences
from tests.faults.traps import MOMENTS, OFTEN, killing_at
from tests.launch import ROOT, Launch
from tests.small_runs import make_models, options

EVALUATED = dict(eval_interval=3, eval_dataset_name=ROOT / "presets" / "tiny" / "text" / "english.txt", eval_windows=5)
LANES = {
    "cached": dict(dtype="bfloat16", grad_accumulation_steps=2, save_interval=4, teacher_prefetch=1, **EVALUATED),
    "stream": dict(no_dataset_streaming=False, shuffle_buffer=30, epochs=4, **EVALUATED),
    "owners": dict(dtype="bfloat16", gradient_exchange="owners", gradient_bits=8, save_interval=4, **EVALUATED),
    "aligned": dict(stage="align", dtype="bfloat16", grad_accumulation_steps=2, save_interval=4, **EVALUATED),
}
STEPS = 24  # optimizer steps of a run
AT_RANDOM = "at a random time"


def run_campaign(folder: Path, lane: str, n_ranks: int, n_kills: int, seed: int, n_steps: int = STEPS) -> dict:
    """Kills runs of `n_steps` optimizer steps until `n_kills` have hit. A run that ends meanwhile is compared with an
    undisturbed one, and another begins.
    """
    dice, lane_options = random.Random(seed), dict(LANES[lane], max_steps=n_steps)
    last_micro_step = n_steps * lane_options.get("grad_accumulation_steps", 1)
    models = make_models(folder)
    straight = Launch(options(models, folder / "straight", **lane_options), n_ranks, folder / "straight.log")
    assert straight.wait() == [0] * n_ranks, straight.log.read_text()
    result = {"lane": lane, "ranks": n_ranks, "kills": 0, "moments": {}, "launches": 0, "runs": 0, "differences": []}
    moments = list(MOMENTS)
    while result["kills"] < n_kills or (folder / "killed").exists():
        moment = dice.choice([*moments, *[AT_RANDOM] * len(moments)]) if result["kills"] < n_kills else None
        argv = options(models, folder / "killed", resume="auto", save_total_limit=3, **lane_options)
        log = folder / f"launch-{result['launches']}.log"
        launch = Launch(argv, n_ranks, log, arm_for(moment, n_ranks, dice))
        result["launches"] += 1
        if moment == AT_RANDOM:
            kill_at_random(launch, dice)
        codes = launch.wait()
        if -9 in codes:
            result["kills"] += 1
            result["moments"][moment] = result["moments"].get(moment, 0) + 1
        elif any(codes):
            raise AssertionError(f"{moment}: exit codes {codes}\n{log.read_text()[-4000:]}")
        else:
            result["runs"] += 1
            result["differences"] += differences(folder / "straight", folder / "killed", last_micro_step)
            shutil.rmtree(folder / "killed")
    return result


def arm_for(moment: str | None, n_ranks: int, dice: random.Random):
    if moment is None or moment == AT_RANDOM:
        return None
    return killing_at(moment, dice.randint(1, 6 if moment in OFTEN else 2), dice.randrange(n_ranks))


def kill_at_random(launch: Launch, dice: random.Random) -> None:
    """Kills some time after training has begun, or before."""
    began, patience = time.monotonic(), dice.uniform(0.5, 20.0)
    while time.monotonic() - began < patience and " optimizer steps of " not in launch.text() and not launch.ended():
        time.sleep(0.005)
    time.sleep(dice.uniform(0.0, 0.5))
    launch.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--lane", choices=LANES, default="cached")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = run_campaign(Path(folder), args.lane, args.ranks, args.kills, args.seed)
    json.dump(result, sys.stdout, indent=2)


if __name__ == "__main__":
    main()
