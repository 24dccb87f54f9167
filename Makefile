# `make demo` and `make test` work in a fresh clone: both create .venv and install what they need.

PYTHON ?= python3
BIN := .venv/bin
# Twice quiet hides pip's warnings; its errors are still printed.
PIP_INSTALL := $(BIN)/pip install --quiet --quiet --no-compile
DEMO := runs/demo
BENCH := runs/bench
# More options for the two commands of the demo, such as `make demo DEMO_TRAIN="--max_steps 40"`.
DEMO_TRAIN ?=
DEMO_EVAL ?=
BENCH_OPTIONS ?=
CHECK_KERNELS ?=

.PHONY: setup setup-dev setup-bench setup-cuda demo demo-real test test-bench test-slow test-real test-pythons faults lint \
	bench check-kernels gpu-check

setup: .venv/installed
setup-dev: .venv/installed-dev
setup-bench: .venv/installed-bench

.venv/installed: requirements.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP_INSTALL) -r requirements.txt
	touch $@

# The tests use mamba-ssm's Python files as a reference; its CUDA extension is not built.
.venv/installed-dev: .venv/installed requirements-dev.txt
	$(PIP_INSTALL) -r requirements-dev.txt
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
		$(PIP_INSTALL) --no-deps --no-build-isolation mamba-ssm==2.3.2.post1
	touch $@

.venv/installed-bench: .venv/installed requirements-bench.txt
	$(PIP_INSTALL) --no-deps -r requirements-bench.txt
	$(PIP_INSTALL) lm-eval==0.4.13
	touch $@

# Reads a teacher from a GGUF file.
.venv/installed-gguf: .venv/installed requirements-dev.txt
	$(PIP_INSTALL) $$(grep '^gguf==' requirements-dev.txt)
	touch $@

# Kernels for NVIDIA GPUs. requirements-cuda.txt says what they are and what runs without them. The last one is compiled
# by nvcc, which takes a quarter of an hour.
setup-cuda: .venv/installed
	$(PIP_INSTALL) setuptools==80.9.0 wheel==0.45.1 ninja packaging
	MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE \
		$(PIP_INSTALL) --no-deps --no-build-isolation $$(grep -E '^(mamba-ssm|einops)==' requirements-cuda.txt)
	CAUSAL_CONV1D_FORCE_BUILD=TRUE \
		$(PIP_INSTALL) --no-deps --no-build-isolation $$(grep -E '^causal-conv1d==' requirements-cuda.txt)

# Trains a tiny student on two ranks, on GPUs or CPU, scores all four models on MMLU, and draws the report. An earlier
# demo is moved aside, not overwritten.
demo: .venv/installed
	if [ -e $(DEMO) ]; then mv $(DEMO) $(DEMO)-$$(date +%Y%m%d-%H%M%S); fi
	$(BIN)/torchrun --standalone --nproc_per_node=2 train_gpus.py --preset tiny --layer_map_interval 25 \
		--output_dir $(DEMO) $(DEMO_TRAIN)
	$(BIN)/python eval_mmlu_hybrid.py --preset tiny --which student hybrid hybrid_ft teacher \
		--ckpt $$(ls -d $(DEMO)/checkpoint-* | sort -V | tail -1) --output $(DEMO)/eval.json $(DEMO_EVAL)
	$(BIN)/python report.py $(DEMO)

# Makes a hybrid of a real pretrained teacher: downloads it, builds a student, aligns, distils, scores, and reports.
include presets/smollm2-135m/demo.mk
demo-real: $(REAL)/report.md
	@echo "The report is $(REAL)/report.md, with charts in $(REAL)/report/index.html"

# Runs two tests at a time, each process with one thread: the tensors are tiny, and many tests start several processes.
# The ten slowest tests are listed at the end.
test: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --dist loadfile --no-loadscope-reorder

# Kills runs at every moment, damages checkpoints and fills disks, as docs/reliability.md reports.
faults: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults.campaign

# Runs what `make test` leaves out because it is slow: every benchmark at its smallest size, from end to end.
test-bench: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m bench

# Runs what `make test` leaves out for its length: the whole demo with its scores, compiled C++, torchrun killed, and the
# runs of `make gpu-check`.
test-slow: .venv/installed-dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

# Runs a few steps of `make demo-real`, in minutes, if its teacher has been downloaded before.
test-real: .venv/installed-dev
	$(BIN)/python -m pytest -m real -rs tests/test_demo_real.py

# Installs everything for every Python from 3.10 to 3.13 that is found, and trains briefly: gigabytes, minutes for each.
test-pythons:
	$(PYTHON) tests/pythons.py $(VERSIONS)

# Compiles the Triton kernels of training for GPUs that need not be here, and reports registers, spills, shared memory.
# Triton is in a folder of its own, which nothing else sees: with it, torch.compile and the tests would not be what they
# are on a CPU. fla-core's kernels are compiled by CHECK_KERNELS="--scan fla-core --targets 100".
check-kernels: .venv/triton/installed
	OMP_NUM_THREADS=1 PYTHONPATH=.:.venv/triton $(BIN)/python benchmarks/compiled_code.py
	OMP_NUM_THREADS=1 PYTHONPATH=.:.venv/triton $(BIN)/python benchmarks/check_kernels.py $(CHECK_KERNELS)

.venv/triton/installed: .venv/installed-dev
	rm -rf .venv/triton
	$(PIP_INSTALL) --no-deps --target .venv/triton triton==3.6.0 fla-core==0.5.2
	touch $@

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Runs every benchmark but bench_gpu.py, bench_conversion.py (docs/conversion.md) and bench_choice.py, which measures no
# time, in hours, on a machine that should do nothing else. Each prints a table and writes its rows to runs/bench/.
# project_wire.py measures nothing.
bench: .venv/installed-bench
	for name in loss step wire overlap launches sync data save mmlu; do \
		$(BIN)/python benchmarks/bench_$$name.py --json $(BENCH)/$$name.json $(BENCH_OPTIONS) || exit 1; \
	done

# Checks a machine with GPUs in under ten minutes, or one of its parts in under nine: make gpu-check PARTS=train. Installs
# nothing: without .venv it takes the packages of the python3 on the path. The report is gpu-check.md.
PARTS ?= first,train,bench
comma := ,
gpu-check:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) -m preflight.gpu_check --parts $(subst $(comma), ,$(PARTS)) \
		--output gpu-check.md
