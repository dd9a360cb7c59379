# make bench   set up .venv, build, run the main job: patched Swin models, proof of equality, speed
# make test    the same set-up, then every check that CI runs
# SYSTEM=1     use the interpreter at hand with what it already has, without a network; builds in place

PYTHON ?= python3
OUT ?= reports/gpu
VENV := .venv

# The versions CI is built and tested on. torch first: an open range would bring a CUDA build of several gigabytes.
TORCH := torch==2.13.0
TRITON := triton==3.7.1
TORCHVISION := torchvision==0.28.0
BUILD := "setuptools>=77,<82" wheel ninja pybind11
BENCH := rich matplotlib scikit-learn scikit-image pillow packaging
TEST := "pytest>=8" pytest-benchmark hypothesis safetensors timm "transformers>=5.9" diffusers ruff mypy

ifeq ($(SYSTEM),1)
RUN := $(PYTHON)
STAMP := build/.system
else
RUN := $(VENV)/bin/python
STAMP := $(VENV)/.installed
endif

SOURCES := $(shell find csrc -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh') setup.py

.PHONY: install bench test lint gpu clean

install: $(STAMP)

$(VENV)/.installed: pyproject.toml Makefile $(SOURCES)
	@echo "== python environment in $(VENV)"
	$(PYTHON) -m venv $(VENV)
	$(RUN) -m pip install -q --upgrade pip
	@echo "== torch"
	$(RUN) -m pip install -q $(TORCH) $(BUILD)
	@echo "== triton, torchvision, what benchmarks need"
	$(RUN) -m pip install -q $(TRITON) $(BENCH)
	$(RUN) -m pip install -q --no-deps $(TORCHVISION)
	@echo "== native kernels"
	ACCEL_REQUIRE_NATIVE=1 $(RUN) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

build/.system: $(SOURCES)
	ACCEL_REQUIRE_NATIVE=1 $(PYTHON) setup.py -q build_ext --inplace
	@mkdir -p build && touch $@

$(VENV)/.tools: $(VENV)/.installed
	@echo "== test tools and the libraries that are patched"
	$(RUN) -m pip install -q $(TEST)
	@touch $@

bench: install
	$(RUN) -m accel doctor
	$(RUN) -m accel bench

ifeq ($(SYSTEM),1)
TOOLS := $(STAMP)
else
TOOLS := $(VENV)/.tools
endif

lint: $(TOOLS)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy

test: $(TOOLS)
ifneq ($(SYSTEM),1)
	$(MAKE) lint
endif
	$(RUN) -m accel doctor
	ACCEL_REQUIRE_NATIVE=1 $(RUN) -m pytest -q -m "not slow and not gpu" --durations=15

# For a machine with a GPU and no network: the interpreter at hand, values first (at most 4 minutes), then speed by
# priority; fits in 8 minutes, and what has run is on disk whatever happens to the rest.
gpu: build/.system
	mkdir -p $(OUT)
	-$(PYTHON) -m accel doctor > $(OUT)/doctor.txt 2>&1; cat $(OUT)/doctor.txt
	-timeout 240 $(PYTHON) -m pytest -v --maxfail=30 -p no:cacheprovider -m "not slow" --junitxml=$(OUT)/tests.xml \
		tests/*/test_*_gpu.py tests/*/test_*_triton.py > $(OUT)/tests.txt 2>&1; \
		tail -n 40 $(OUT)/tests.txt
	-timeout 210 $(PYTHON) -m accel bench --device cuda --budget 180 --out $(OUT)/bench > $(OUT)/bench.txt 2>&1; \
		tail -n 80 $(OUT)/bench.txt

clean:
	rm -rf build dist $(VENV) accel/*.so accel/_build_log.txt *.egg-info
