# make bench         set up .venv, build, run the main job: patched Swin models, proof of equality, speed
# make test          the same set-up, then every check that CI runs
# make settle        tests of emulated kernels whose sources have changed; make test runs an eighth of the others
# make test-newest   the same checks beside the newest torch, in .venv-newest (a CUDA build: 6 GB)
# make sweep        every family of transformers and timm, tiny, with the kernels; what became of them, as a page
# SYSTEM=1           use the interpreter at hand with what it already has, without a network; builds in place

PYTHON ?= python3
OUT ?= reports/gpu
VENV := .venv
CONSTRAINTS := constraints.txt
NEWEST := torch==2.14.1 torchvision==0.29.1 triton==3.8.0

BUILD := setuptools wheel ninja pybind11
BENCH := triton transformers timm rich matplotlib scikit-learn scikit-image pillow packaging
TEST := pytest pytest-xdist pytest-benchmark hypothesis safetensors timm transformers diffusers FLASH-pytorch ruff mypy
SWEEP := accelerate peft torchao
# as many threads as cores in each of two processes would wait for one another; tests of threads set their number
PARALLEL := -n 2 --dist worksteal
ONE_THREAD := OMP_NUM_THREADS=1

ifeq ($(SYSTEM),1)
RUN := $(PYTHON)
NATIVE := build/.system
BENCHED := $(NATIVE)
TESTED := $(NATIVE)
PARALLEL :=
ONE_THREAD :=
else
RUN := $(VENV)/bin/python
NATIVE := $(VENV)/.native
BENCHED := $(VENV)/.bench
TESTED := $(VENV)/.test
endif
PIP := $(RUN) -m pip install -q -c $(CONSTRAINTS)

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py

# $(call timed,what,command): runs the command and says how long it took
timed = @start=$$(date +%s); $(2); code=$$?; echo "== $(1) took $$(($$(date +%s) - start)) s"; exit $$code

.PHONY: install tools bench test settle test-newest sweep lint gpu clean

# the native kernels are compiled while pip unpacks what else is needed
install:
	@$(MAKE) --no-print-directory -j2 $(NATIVE) $(BENCHED)

tools:
	@$(MAKE) --no-print-directory -j2 $(NATIVE) $(TESTED)

$(VENV)/.torch: pyproject.toml Makefile $(CONSTRAINTS)
	@echo "== python environment in $(VENV), torch"
	$(PYTHON) -m venv $(VENV)
	$(PIP) pip
	$(PIP) torch $(BUILD)
	@touch $@

$(VENV)/.native: $(VENV)/.torch $(SOURCES)
	@echo "== native kernels"
	ACCEL_REQUIRE_NATIVE=1 $(PIP) --no-build-isolation --no-deps -e .
	@touch $@

$(VENV)/.bench: $(VENV)/.torch
	@echo "== triton, torchvision, what benchmarks need"
	$(PIP) $(BENCH)
	$(PIP) --no-deps torchvision
	@touch $@

$(VENV)/.test: $(VENV)/.torch
	@echo "== triton, torchvision, test tools and the libraries that are patched"
	$(PIP) $(BENCH) $(TEST)
	$(PIP) --no-deps torchvision
	@touch $@ $(VENV)/.bench

build/.system: $(SOURCES)
	ACCEL_REQUIRE_NATIVE=1 $(PYTHON) setup.py -q build_ext --inplace
	@mkdir -p build && touch $@

build/newest.txt: constraints.txt Makefile
	@mkdir -p build
	grep -vE '^(torch|torchvision|triton)==' constraints.txt > $@
	printf '%s\n' $(NEWEST) >> $@

bench: install
	$(RUN) -m accel doctor
	$(RUN) -m accel bench

lint: tools
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test:
	$(call timed,set-up,$(MAKE) --no-print-directory tools)
ifneq ($(SYSTEM),1)
	$(call timed,lint,$(MAKE) --no-print-directory lint)
endif
	$(RUN) -m accel doctor
	$(call timed,tests,ACCEL_REQUIRE_NATIVE=1 $(ONE_THREAD) $(RUN) -m pytest -q $(PARALLEL) -m "not slow and not gpu" --settled --durations=15)

settle: tools
	$(ONE_THREAD) $(RUN) tests/_settled.py

test-newest: build/newest.txt
	$(MAKE) test VENV=.venv-newest CONSTRAINTS=build/newest.txt

sweep: tools
	$(PIP) $(SWEEP)
	$(call timed,transformers,$(RUN) tests/sweep --table tests/sweep/RESULTS.md)
	$(call timed,the rest,$(ONE_THREAD) $(RUN) -m pytest -q $(PARALLEL) -m "slow or not slow" tests/sweep --ignore tests/sweep/test_transformers.py)

# For a machine with a GPU and no network: the interpreter at hand, values first (at most 4 minutes), then speed by
# priority; fits in 8 minutes, and what has run is on disk whatever happens to the rest.
gpu: build/.system
	mkdir -p $(OUT)
	-$(PYTHON) -m accel doctor > $(OUT)/doctor.txt 2>&1; cat $(OUT)/doctor.txt
	-timeout 240 $(PYTHON) -m pytest -v --maxfail=30 -p no:cacheprovider -m "not slow" --junitxml=$(OUT)/tests.xml \
		tests/*/test_*_gpu.py tests/*/test_*_triton.py > $(OUT)/tests.txt 2>&1; \
		tail -n 40 $(OUT)/tests.txt
	-timeout 210 $(PYTHON) -m accel bench --goals --device cuda --budget 180 --out $(OUT)/bench > $(OUT)/bench.txt 2>&1; \
		tail -n 80 $(OUT)/bench.txt

clean:
	rm -rf build dist .venv .venv-newest accel/*.so accel/_build_log.txt *.egg-info
