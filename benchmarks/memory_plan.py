"""The memory plan of a training command: plan.py, under the name that goes with the benchmarks.

python benchmarks/memory_plan.py [options of train_gpus.py] --gpus 5 --gpu_gb 80 --tflops 790 --json plan.json
"""

import subprocess
import sys
from pathlib import Path

if __name__ == "__main__":
    # As a script of its own, plan.py finds the modules beside it.
    plan = Path(__file__).resolve().parents[1] / "plan.py"
    sys.exit(subprocess.run([sys.executable, str(plan), *sys.argv[1:]]).returncode)
