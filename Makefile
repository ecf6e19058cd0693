# One word per job. Each installs what it needs into the active environment, or into .venv if none is active.
#   make demo    train on real digits with every balancing method
#   make test    the test suite, and once more what concerns Triton in its interpreter
#   make lint    formatting, lint, types
#   make bench   measure against what people would use instead
#   make gpu     what a machine with a GPU can show, into OUT=folder; installs nothing, takes the active python3
# TORCH='torch==2.13.0' chooses another torch than the newest.

PYTHON3 ?= python3
TORCH ?= torch>=2.11
VENV := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX),$(CURDIR)/.venv)
PYTHON := $(VENV)/bin/python
PIP := $(PYTHON) -m pip --disable-pip-version-check
NATIVE := $(shell find csrc -type f)
SOURCES := setup.py csrc dbmtl_fused triton_kernels benchmarks tests examples

# The CUDA module takes minutes to build for every kind of GPU: make builds it for those that are here, if any.
ifeq ($(shell command -v nvidia-smi),)
export DBMTL_FUSED_CUDA ?= 0
else
export TORCH_CUDA_ARCH_LIST ?= $(shell nvidia-smi --query-gpu=compute_cap --format=csv,noheader | sort -u | paste -sd' ')
endif

.PHONY: demo test suite suite-interpreted bench gpu lint format clean
.DELETE_ON_ERROR:

demo: $(VENV)/.dbmtl_fused-demo
	$(PYTHON) -m dbmtl_fused demo $(ARGS)

test: suite suite-interpreted

suite: $(VENV)/.dbmtl_fused-dev
	$(PYTHON) -m pytest $(ARGS)

suite-interpreted: $(VENV)/.dbmtl_fused-dev
	TRITON_INTERPRET=1 $(PYTHON) -m pytest $(ARGS)

bench: $(VENV)/.dbmtl_fused-bench
	$(PYTHON) -m dbmtl_fused bench $(ARGS)

gpu:
	$(PYTHON3) -m benchmarks.gpu $(if $(OUT),--out $(OUT)) $(ARGS)

lint: $(VENV)/.dbmtl_fused-dev
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .
	$(VENV)/bin/mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(NATIVE)

format: $(VENV)/.dbmtl_fused-dev
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .
	$(VENV)/bin/clang-format -i $(NATIVE)

clean:
	rm -rf build dist *.egg-info dbmtl_fused/_C*.so dbmtl_fused/_build_error*.txt $(VENV)/.dbmtl_fused-*

$(PYTHON):
	$(PYTHON3) -m venv $(VENV)

# The stamp of one set of extras. Compiler warnings are errors for developers only: users' compilers are not ours to know.
$(VENV)/.dbmtl_fused-%: pyproject.toml setup.py $(NATIVE) | $(PYTHON)
	$(PIP) install "setuptools>=77" "ninja" "pybind11>=2.12" "$(TORCH)"
	DBMTL_FUSED_WERROR=$(if $(filter dev,$*),1,0) $(PIP) install --quiet --no-build-isolation --editable ".[$*]"
	touch $@
