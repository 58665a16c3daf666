# `make train` and `make test` work on a fresh machine with Python 3.11 or 3.12: they create .venv first.
PYTHON ?= $(firstword $(foreach p,python3.12 python3.11 python3,$(if $(shell $(p) -c 'import sys; sys.version_info[:2] in ((3, 11), (3, 12)) and print(1)' 2>/dev/null),$(p))))
BIN := .venv/bin
SEEDS ?= 0 1 2
HIDDEN := ops reference triton_kernels cuda_kernels cpu_kernels info libraries backends checks numerics
OUT ?= bench/results/gpu
BUDGET ?= 3600
JOBS ?= 1
TEST_JOBS ?= $(shell nproc 2>/dev/null || echo 2)
# The oldest and the newest Triton that the kernels support; constraints.txt names the one in use.
TRITONS := 3.6.0 3.9.0
# The oldest PyTorch that the project supports.
TORCHES := 2.11.0

.PHONY: train test test-slow test-triton-versions test-torch-versions cross-compile cuda memcheck racecheck asan bench bench-compare gpu docs check \
  shapes-table camvid-table clean

train: .venv/installed
	$(BIN)/python -m cmim.train

test: .venv/installed-test
	$(BIN)/python -m pytest -n $(TEST_JOBS) --dist loadfile

test-slow: .venv/installed-test
	$(BIN)/python -m pytest -m slow

# Every kernel and launch configuration for GPUs that need not be there: registers, spills, shared memory.
cross-compile: .venv/installed-test
	$(BIN)/python -m tests.backends.cross_compile && $(BIN)/python -m tests.backends.cross_compile --few --architectures 90

# The kernels on other versions of Triton: interpreted against PyTorch, then compiled and launched on the stub driver.
test-triton-versions: .venv/installed-test $(TRITONS:%=build/triton-%/installed)
	@for version in $(TRITONS); do echo "Triton $$version"; export PYTHONPATH=build/triton-$$version; \
	  $(BIN)/python -m pytest tests/backends && $(BIN)/python -m tests.backends.cross_compile && \
	  $(BIN)/python -m pytest tests/backends/test_stub_driver.py -m slow -k "not oldest" || exit 1; done

# The interpreter of Triton 3.6 needs an older NumPy.
build/triton-%/installed: .venv/installed-test
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $(@D) triton==$* $(if $(filter 3.6.%,$*),'numpy<2.4')
	@touch $@

# The kernels, csrc/ included, on other versions of PyTorch and the Triton that belongs to it.
test-torch-versions: .venv/installed-test $(TORCHES:%=build/torch-%/installed)
	@for version in $(TORCHES); do echo "PyTorch $$version"; export PYTHONPATH=build/torch-$$version; \
	  $(BIN)/python -m pytest tests/csrc tests/kernels tests/backends || exit 1; done

# The libraries of CUDA are those of the PyTorch in .venv.
build/torch-%/installed: .venv/installed-test
	$(BIN)/python -m pip install --disable-pip-version-check -q --no-deps --target $(@D) torch==$* \
	  $(if $(filter 2.11.%,$*),triton==3.6.0 'numpy<2.4',triton)
	@touch $@

# Every op, the decoders and the training step against what one would run instead.
bench: .venv/installed-test
	$(BIN)/python -m pytest bench -p bench.recorder --results build/bench.jsonl

bench-compare: .venv/installed-test
	@test -f "$(A)" -a -f "$(B)" || { echo "error: name two results: make bench-compare A=old.json B=new.json"; exit 2; }
	$(BIN)/pytest-benchmark compare $(A) $(B) --group-by=name --columns=min,median --sort=name

# On a machine with a GPU: everything that only it can show. Another call goes on where this one ends.
gpu: .venv/installed-test
	PYTHONPATH=.:kernels $(BIN)/python -m bench.gpu $(OUT) --budget $(BUDGET) $(if $(DATA),--data $(DATA))
	$(BIN)/python -m bench.report $(OUT)/results.jsonl

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

# The kernels for the CPU under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.
asan: .venv/installed-test
	$(BIN)/python -m tests.csrc.sanitize

# The reference of the public functions and of every setting: build/docs/index.html.
docs: .venv/installed-test
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[docs]' -c constraints.txt
	PYTHONPATH=.:kernels $(BIN)/pdoc -d google --no-show-source -o build/docs cmim_kernels $(HIDDEN:%='!cmim_kernels.%') \
	  cmim.settings cmim.models.reconstruction cmim.method.objective

check: .venv/installed-test
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# The README's tables: every preset on every seed, then mean and spread.
shapes-table: .venv/installed
	$(BIN)/python -m cmim.compare --output runs/shapes-table --presets supervised fixmatch cmim --seeds $(SEEDS) --jobs $(JOBS)

camvid-table: .venv/installed
	@test -d "$(DATA)/train" || { echo "error: name the folder of CamVid: make camvid-table DATA=PATH"; exit 2; }
	$(BIN)/python -m cmim.compare configs/camvid_tiny.yaml --output runs/camvid-table \
	  --presets supervised fixmatch cmim --seeds $(SEEDS) --jobs $(JOBS) --data.root $(DATA)

.venv/installed: setup.py pyproject.toml constraints.txt $(wildcard csrc/*.* csrc/cpu/*.*)
	@test -n "$(PYTHON)" || { echo "error: no Python 3.11 or 3.12 found; install one, or name it: make PYTHON=/path/to/python"; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check -q torch torchvision -c constraints.txt  # csrc/ is compiled for it
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[train]' -c constraints.txt
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --disable-pip-version-check -q -e '.[test]' -c constraints.txt
	@touch $@

clean:
	rm -rf .venv build *.egg-info
