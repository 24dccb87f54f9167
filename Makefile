# Two commands do everything from nothing: `make demo` and `make test`. Both make .venv and install what they need.

PYTHON ?= python3
BIN := .venv/bin
DEMO := runs/demo
BENCH := runs/bench
BENCH_OPTIONS ?=

.PHONY: setup setup-dev setup-bench setup-cuda demo test test-bench test-pythons faults lint bench

setup: .venv/installed
setup-dev: .venv/installed-dev
setup-bench: .venv/installed-bench

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --no-compile -r requirements.txt
	touch $@

# Of mamba-ssm the tests need the Python files alone, as a reference; its CUDA extension is not built.
.venv/installed-dev: .venv/installed requirements-dev.txt
	$(BIN)/pip install --quiet --no-compile -r requirements-dev.txt
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
		$(BIN)/pip install --quiet --no-compile --no-deps --no-build-isolation mamba-ssm==2.2.4
	touch $@

.venv/installed-bench: .venv/installed requirements-bench.txt
	$(BIN)/pip install --quiet --no-compile --no-deps -r requirements-bench.txt
	$(BIN)/pip install --quiet --no-compile lm-eval==0.4.13
	touch $@

# Kernels for NVIDIA GPUs; requirements-cuda.txt tells what they are and what happens without. The second needs nvcc.
setup-cuda: .venv/installed
	$(BIN)/pip install --quiet setuptools==80.9.0 wheel==0.45.1 ninja packaging
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
		$(BIN)/pip install --no-deps --no-build-isolation $$(grep -E '^(mamba-ssm|einops)==' requirements-cuda.txt)
	CAUSAL_CONV1D_FORCE_BUILD=TRUE \
		$(BIN)/pip install --no-deps --no-build-isolation $$(grep -E '^causal-conv1d==' requirements-cuda.txt)

# Two students and their teacher, tiny, on whatever this machine has; then all four models' scores, and a report. A demo
# run before this one is moved aside, not overwritten.
demo: .venv/installed
	if [ -e $(DEMO) ]; then mv $(DEMO) $(DEMO)-$$(date +%Y%m%d-%H%M%S); fi
	$(BIN)/torchrun --standalone --nproc_per_node=2 train_gpus.py --preset tiny --layer_map_interval 25 \
		--output_dir $(DEMO)
	$(BIN)/python eval_mmlu_hybrid.py --preset tiny --which student hybrid hybrid_ft teacher \
		--ckpt $$(ls -d $(DEMO)/checkpoint-* | sort -V | tail -1) --output $(DEMO)/eval.json
	$(BIN)/python report.py $(DEMO)

# Tensors here are tiny and many tests start several processes: more threads would only get in each other's way. Two
# tests at a time, as most of a test of a script is waiting: for imports, ranks, a disk.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Runs killed at every moment, checkpoints damaged, disks filled: what docs/reliability.md reports.
faults: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign

# What `make test` leaves out for its length: every benchmark at its smallest, from end to end.
test-bench: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m bench

# The whole installation and a short run on every Python from 3.10 on that is here: gigabytes, and minutes for each.
test-pythons:
	$(PYTHON) tests/pythons.py $(VERSIONS)

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Times mean something on a machine that does nothing else. Each prints its table and leaves its rows in runs/bench/.
bench: .venv/installed-bench
	for name in loss step wire overlap data save mmlu; do \
		$(BIN)/python benchmarks/bench_$$name.py --json $(BENCH)/$$name.json $(BENCH_OPTIONS) || exit 1; \
	done
