# Everything a newcomer needs: `make test`, `make pretrain`. Each target makes what it lacks.
#
#   PYTHON=python3.12   the interpreter that the environment is made with
#   VENV=.venv          where it lies; VENV=none uses PYTHON's own packages and downloads nothing
#   TORCH='"torch==2.13.0" --index-url URL'   which torch to install, and from where
#   ARGS="..."          passed on to the program behind the target
#   PROCS=2             processes of `make pretrain`, with ARGS="--parallel ddp" or fsdp2
#   CONFIG=small        `make compare` on a GPU; cpu without it

PYTHON ?= python3
VENV ?= .venv
TORCH ?= "torch>=2.11,<2.14"
ARGS ?=
PROCS ?=
CONFIG ?= cpu

ifeq ($(VENV),none)
PY := $(PYTHON)
STAMPS := build/stamps
CLANG_FORMAT := clang-format
else
PY := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
CLANG_FORMAT := $(VENV)/bin/clang-format
endif
PIP := $(PY) -m pip --disable-pip-version-check install --quiet
BUILD_TOOLS := "setuptools>=64" wheel "ninja>=1.11" "pybind11>=2.13,<4"

# an environment keeps the torch that it was made with
MADE_WITH := $(file <$(STAMPS)/torch)
ifneq ($(MADE_WITH),)
ifeq ($(origin TORCH),file)
TORCH := $(MADE_WITH)
else ifneq ($(MADE_WITH),$(TORCH))
ifeq ($(filter clean help,$(MAKECMDGOALS)),)
$(error $(VENV) was made with TORCH=$(MADE_WITH); make clean, or choose another folder: VENV=...)
endif
endif
endif

.PHONY: help test test-external test-failure test-oldest-triton pretrain compare reproduce compact-study profile bench wheel gpu lint clean

help:
	@sed -n 's/^# \?//p' Makefile | sed -n '1,8p'
	@echo "Targets: test, test-external, test-failure, test-oldest-triton, pretrain, compare,"
	@echo "  reproduce, compact-study, profile, bench, wheel, gpu, lint, clean"

$(STAMPS)/dependencies: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "Python >= 3.10 is needed, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 1; }
ifneq ($(VENV),none)
	test -x $(PY) || $(PYTHON) -m venv $(VENV)
	$(PIP) $(TORCH)
	$(PIP) $(BUILD_TOOLS)
endif
	@mkdir -p $(STAMPS) && touch $@ && printf '%s' '$(TORCH)' > $(STAMPS)/torch

$(STAMPS)/extension: $(STAMPS)/dependencies setup.py $(wildcard csrc/*)
ifeq ($(VENV),none)
	$(PIP) --no-index --no-deps --no-build-isolation --editable .
else
	$(PIP) --no-build-isolation --editable ".[test,bench,bert,trainers]"
endif
	@touch $@

test: $(STAMPS)/extension
	$(PY) -m pytest $(ARGS)

# other people's tests from checkouts: make test-external PYTORCH_SOURCE=... APEX_SOURCE=...
EXTERNAL = $(if $(PYTORCH_SOURCE),tests/external/torch_optim.py) \
  $(if $(APEX_SOURCE),tests/external/apex_optimizers.py)
test-external: $(STAMPS)/extension
	@test -n "$(strip $(EXTERNAL))" || \
	  { echo "name a checkout: make test-external PYTORCH_SOURCE=... APEX_SOURCE=..."; exit 1; }
	$(PY) -m pytest -rs $(EXTERNAL) $(ARGS)

# processes killed at random moments, more often than `make test` does it
test-failure: $(STAMPS)/extension
	MAXVA_FAILURE_TRIALS=20 $(PY) -m pytest tests/test_failure.py $(ARGS)

# the Triton kernels with the Triton of torch 2.11, whose interpreter needs an older NumPy; of what is
# compiled one architecture
OLDEST_TRITON := 3.6.0
build/triton-$(OLDEST_TRITON): | $(STAMPS)/extension
	rm -rf $@.tmp  # of a run that was cut off
	$(PIP) --no-deps --target $@.tmp triton==$(OLDEST_TRITON) "numpy<2.4" && mv $@.tmp $@
test-oldest-triton: build/triton-$(OLDEST_TRITON)
	export PYTHONPATH=$(CURDIR)/$< && \
	  $(PY) -c 'import triton; assert triton.__version__ == "$(OLDEST_TRITON)", triton' && \
	  $(PY) -m pytest tests/test_triton.py tests/test_triton_packed.py \
	    tests/test_triton_compilation.py -k "not sm_80 and not sm_100" $(ARGS)

pretrain: $(STAMPS)/extension
	$(PY) $(if $(PROCS),-m torch.distributed.run --standalone --nproc-per-node $(PROCS)) examples/bert_pretraining/pretrain.py $(ARGS)

# AdamW, LAMB, MAdam and LaMAdam at pretraining (docs/comparison.md), into runs/compare-CONFIG
compare: $(STAMPS)/extension
	$(PY) examples/bert_pretraining/compare.py --config $(CONFIG) $(ARGS)

# the paper's synthetic studies (docs/reproduction.md), into runs/reproduction
reproduce: $(STAMPS)/extension
	$(PY) examples/reproduction/reproduce.py $(ARGS)

# what compact states cost (docs/compact_states.md); ARGS="--only pretraining" for a part of it
compact-study: $(STAMPS)/extension
	$(PY) bench/compact_states.py --write docs/compact_states.md $(ARGS)

# times, bandwidth and memory of a step: ARGS="--help" says what can be chosen
profile: $(STAMPS)/extension
	$(PY) -m maxva_kernels.profile $(ARGS)

bench: $(STAMPS)/extension
	$(PY) -m pytest bench --results bench/results/latest \
	  --benchmark-json=bench/results/benchmark.json $(ARGS)

# a wheel with CUDA kernels, no GPU needed: tools/make_wheel.sh says what can be set
wheel:
	PYTHON=$(PYTHON) tools/make_wheel.sh

# build, tests and the profiler on this machine's GPU, with PYTHON's own packages, offline
gpu:
	PYTHON=$(PYTHON) tools/run_gpu.sh

$(STAMPS)/lint-tools: $(STAMPS)/extension
ifneq ($(VENV),none)
	$(PIP) --no-build-isolation --editable ".[dev]"
endif
	@touch $@

lint: $(STAMPS)/lint-tools
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(CLANG_FORMAT) --dry-run --Werror $(wildcard csrc/* tests/cpp/*.* tests/cpp/*/* bench/*.cpp)

clean:
	rm -rf build dist .venv-wheel *.egg-info maxva_kernels/*.so maxva_kernels/_build_info.py
	$(if $(filter none,$(VENV)),,rm -rf $(VENV))
