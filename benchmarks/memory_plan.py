"""The memory plan of a training command: `train_gpus.py --dry_run`, under the name that goes with the benchmarks.

python benchmarks/memory_plan.py [options of train_gpus.py] --gpus 5 --gpu_gb 80 --tflops 989 --plan_json plan.json
"""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script of its own, train_gpus.py finds the modules beside it.
    entry = Path(__file__).resolve().parents[1] / "train_gpus.py"
    sys.exit(subprocess.run([sys.executable, str(entry), "--dry_run", *sys.argv[1:]]).returncode)
