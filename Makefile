# Two commands do everything: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON ?= python3
VENV   ?= .venv
EXTRAS ?= test
JOBS   ?= 2

BIN     := $(VENV)/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python -type f ! -name '*.pyc' ! -path '*__pycache__*')
PYTEST  := -m pytest

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint format sanitize bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "%-10s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "onepass needs Python 3.10 or newer")'
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

# One stamp for each set of extras, so that `make demo` does not install the test tools.
$(VENV)/.installed-%: $(SOURCES) | $(BIN)/python
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/python -m pip install --disable-pip-version-check --quiet ".[$*]"
	@touch $@

venv: $(VENV)/.installed-$(EXTRAS) ## build and install into .venv, with what the tests need

demo: $(VENV)/.installed-demo ## train on the handwritten digits with every optimizer; pictures in demo/
	$(BIN)/python examples/digits.py $(DEMO)

test: venv ## build and run all tests; ARGS goes to pytest
	$(BIN)/python $(PYTEST) $(ARGS)

lint: $(VENV)/.installed-lint ## formatters and static analysis, of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	git ls-files '*.cpp' '*.h' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/cmake -S . -B build/lint -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DONEPASS_PYTHON=ON \
	  -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" > /dev/null
	git ls-files 'csrc/*.cpp' | xargs -n 1 -P $(JOBS) $(BIN)/clang-tidy -p build/lint --quiet --warnings-as-errors='*'

format: $(VENV)/.installed-lint ## rewrite the sources as the formatters want them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' | xargs $(BIN)/clang-format -i

# The sanitized package lies beside the ordinary one and is put in front of it. LeakSanitizer is off: CPython keeps
# memory until the process ends. What is left out runs the same code as the rest (the demo, the documents, the
# benchmarks, comparisons with formulas and with other libraries) or none of it.
UNSANITIZED := demo docs bench isa textbook presets worked_examples schedules reference batchnorm_numerics
SANITIZED := build/sanitized
SANITIZE_ENV = LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libstdc++.so)" \
  ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH="$(CURDIR)/$(SANITIZED)"
sanitize: venv ## the suite under AddressSanitizer and UBSan, the thread pool under ThreadSanitizer
	rm -rf $(SANITIZED)
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-deps \
	  --target $(SANITIZED) -Cbuild-dir=build/sanitize -Ccmake.define.ONEPASS_SANITIZE=address,undefined .
	$(SANITIZE_ENV) $(BIN)/python -c 'import onepass; print("sanitized:", onepass.__file__)' | grep $(SANITIZED)
	$(SANITIZE_ENV) $(BIN)/python $(PYTEST) $(UNSANITIZED:%=--ignore tests/test_%.py) $(ARGS)
	$(CXX) -std=c++20 -O1 -g -fsanitize=thread -Icsrc -pthread tests/cpp/stress_parallel.cpp csrc/cpu/parallel.cpp \
	  -o build/stress_parallel
	build/stress_parallel

bench: venv ## compare with the peers that are installed; results in bench/results
	$(BIN)/python bench/peers/optimizers.py
	$(BIN)/python bench/peers/batchnorm.py
	$(BIN)/python bench/peers/whole_step.py
	$(BIN)/python bench/summary.py

clean: ## remove everything that the targets made
	rm -rf build demo $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
