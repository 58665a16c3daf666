# `make train` and `make test` work on a fresh machine with Python 3.11 or 3.12: they create .venv first.
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(if $(shell $(p) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) and print(1)' 2>/dev/null),$(p))))
BIN := .venv/bin
SEEDS ?= 0 1 2
JOBS ?= 1
# The oldest and the newest Triton that the kernels support; constraints.txt names the one in use.
TRITONS := 3.6.0 3.9.0

.PHONY: train test test-slow test-triton-versions cross-compile cuda memcheck racecheck bench bench-compare gpu check \
  shapes-table camvid-table clean

train: .venv/installed
	$(BIN)/python -m cmim.train

test: .venv/installed-test
	$(BIN)/python -m pytest

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow

# Every kernel and launch configuration for GPUs that need not be there: registers, spills, shared memory.
cross-compile: .venv/installed-test
	$(BIN)/python -m tests.backends.cross_compile

# The kernels on other versions of Triton: interpreted against PyTorch, then compiled and launched on the stub driver.
test-triton-versions: .venv/installed-test $(TRITONS:%=build/triton-%/installed)
	@for version in $(TRITONS); do echo "Triton $$version"; export PYTHONPATH=build/triton-$$version; \
	  $(BIN)/python -m pytest tests/backends && $(BIN)/python -m tests.backends.cross_compile && \
	  $(BIN)/python -m pytest tests/backends/test_stub_driver.py -m slow -k "not oldest" || exit 1; done

# The interpreter of Triton 3.6 needs an older NumPy.
build/triton-%/installed: .venv/installed-test
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $(@D) triton==$* $(if $(filter 3.6.%,$*),'numpy<2.4')
	@touch $@

# Every op, the decoders and the training step against what one would run instead.
bench: .venv/installed-test
	$(BIN)/python -m pytest bench

bench-compare: .venv/installed-test
	@test -f "$(A)" -a -f "$(B)" || { echo "error: name two results: make bench-compare A=old.json B=new.json"; exit 2; }
	$(BIN)/pytest-benchmark compare $(A) $(B) --group-by=name --columns=min,median --sort=name

# On a machine with a GPU: what only it can test, then what it is fast at. The rest of the compiled rivals: make bench.
gpu: .venv/installed-test
	$(BIN)/python -m pytest -m gpu
	$(BIN)/python -m pytest bench -k "not compiled or VOC" --benchmark-json bench/results/gpu.json
	$(BIN)/python -m bench.report bench/results/gpu.json

# The CUDA kernels of csrc/, or the reason why there are none: an installation goes on without them.
cuda: .venv/installed
	CMIM_BUILD_CUDA=1 $(BIN)/python -m pip install --disable-pip-version-check -q --no-deps -e .
	$(BIN)/python -m cmim_kernels.info

# On a GPU, every kernel under NVIDIA's checkers: accesses out of bounds, and races in shared memory of the CUDA kernels.
SANITIZER := PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --target-processes all --error-exitcode 1
CHECKED := tests/backends -k "not compile and not inductor and not graph and not 2_to_the_31 and not beyond_32_bits

memcheck: .venv/installed-test
	$(SANITIZER) --tool memcheck $(BIN)/python -m pytest $(CHECKED)"

racecheck: .venv/installed-test
	$(SANITIZER) --tool racecheck $(BIN)/python -m pytest $(CHECKED) and cuda"

check: .venv/installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# The README's tables: every preset on every seed, then mean and spread.
shapes-table: .venv/installed
	$(BIN)/python -m cmim.compare --output runs/shapes-table --presets supervised fixmatch cmim --seeds $(SEEDS) --jobs $(JOBS)

camvid-table: .venv/installed
	@test -d "$(DATA)/train" || { echo "error: name the folder of CamVid: make camvid-table DATA=PATH"; exit 2; }
	$(BIN)/python -m cmim.compare configs/camvid_tiny.yaml --output runs/camvid-table \
	  --presets supervised fixmatch cmim --seeds $(SEEDS) --jobs $(JOBS) --data.root $(DATA)

.venv/installed: setup.py constraints.txt $(wildcard csrc/*.*)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q -e . -c constraints.txt
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[test]' -c constraints.txt
	@touch $@

clean:
	rm -rf .venv build *.egg-info
