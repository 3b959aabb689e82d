# Two commands do everything: `make demo` and `make test`. Both set up what they need in .venv.
PYTHON   ?= python3
PYTHON_T ?= python3.13t
VENV     ?= .venv
EXTRAS   ?= test
JOBS     ?= 2
CPUS     ?= Nehalem Haswell

BIN     := $(VENV)/bin
SOURCES := CMakeLists.txt pyproject.toml $(shell find csrc python -type f ! -name '*.pyc' ! -path '*__pycache__*')
# As many processes as jobs; PROCESSES=0 runs the tests in pytest's own, for a debugger.
PROCESSES ?= $(JOBS)
PYTEST    := -m pytest --numprocesses $(PROCESSES) --dist worksteal
PIP       := $(BIN)/python -m pip install --disable-pip-version-check --quiet

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test large lint format sanitize sanitize-memory sanitize-threads valgrind emulate cuda-on-host \
  fuzz free-threaded free-threaded-tests bench bench-guard bench-micro bench-peers bench-report \
  bench-roofline clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## *' '{printf "%-16s %s\n", $$1, $$2}'

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "onepass needs Python 3.10 or newer")'
	$(PYTHON) -m venv --clear $(VENV) || { rm -rf $(VENV); exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade pip

# Built once, whatever it is installed for. CUDA kernels are part of it where nvcc is found. Tests read what is left in
# the folder of the build: objects, and what nvcc made on its way to them.
WHEEL := $(VENV)/wheel
BUILD := build/wheel
$(WHEEL)/.built: $(SOURCES) | $(BIN)/python
	rm -rf $(WHEEL)
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(BIN)/python -m pip wheel --disable-pip-version-check --quiet --no-deps \
	  --wheel-dir $(WHEEL) -Cbuild-dir=$(BUILD) -Ccmake.define.ONEPASS_CUDA_KEEP=ON .
	$(PIP) --force-reinstall --no-deps $(WHEEL)/onepass-*.whl
	@touch $@

KERNELS := $(BUILD)/libonepass_cpu.a
$(KERNELS): $(WHEEL)/.built
	@test -f $@ || { rm $<; $(MAKE) --no-print-directory $<; }

# One stamp for each set of extras, so that `make demo` does not install the test tools.
$(VENV)/.installed-%: $(WHEEL)/.built pyproject.toml
	$(PIP) "$$(ls $(WHEEL)/onepass-*.whl)[$*]"
	@touch $@

venv: $(VENV)/.installed-$(EXTRAS) ## build and install into .venv, with what the tests need

demo: $(VENV)/.installed-demo ## train on the handwritten digits with every optimizer; pictures in demo/
	$(BIN)/python examples/digits.py $(DEMO)

test: venv $(KERNELS) ## build and run the tests; ARGS goes to pytest
	ONEPASS_BUILD="$(CURDIR)/$(BUILD)" $(BIN)/python $(PYTEST) -m "not large" $(ARGS)

large: venv ## the tests that need up to 10 GB of memory, one after the other
	$(BIN)/python -m pytest -m large $(ARGS)

# clang-tidy reads the sources of CUDA as the host's compiler does, and each kernel unit for one instruction set: each
# header of simd/ is in some unit, and a third of the time is left.
TIDIED := kernels.cpp=scalar step_kernels.cpp=avx512 batchnorm_kernels.cpp=avx2
lint: $(VENV)/.installed-lint ## formatters and static analysis, of Python and C++
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/codespell
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror
	$(BIN)/cmake -S . -B build/lint -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DONEPASS_PYTHON=ON \
	  -DONEPASS_CUDA_ON_HOST=ON -DONEPASS_UNITY=OFF -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" > /dev/null
	$(BIN)/python tests/tidied.py build/lint/compile_commands.json $(TIDIED)
	git ls-files 'csrc/*.cpp' | xargs ls -S | \
	  xargs -n 1 -P $(JOBS) $(BIN)/clang-tidy -p build/lint --quiet --warnings-as-errors='*'

format: $(VENV)/.installed-lint ## rewrite the sources as the formatters want them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.cpp' '*.h' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

sanitize: sanitize-memory sanitize-threads ## the tests under AddressSanitizer, UBSan and ThreadSanitizer

# A sanitized package lies beside the ordinary one and is put in front of it. LeakSanitizer is off: CPython keeps memory
# until the process ends. What is left out runs the same code as the rest (the demo, the documents, the benchmarks,
# comparisons with formulas and with other libraries, the matrix of bad input, whose kinds bad_inputs has, too) or none
# of it, or measures memory, which the sanitizer keeps.
UNSANITIZED := demo docs bench bench_gpu bench_guard bench_micro bench_report counts isa textbook presets \
  worked_examples schedules reference batchnorm_numerics soak cuda_build batchnorm_plan bad_input_matrix
# Numbers are not in question there: what runs the same loops over arrays with the same ends is run once, rules with one
# number of threads, and not by optimizers again or through functions; many blocks in one dtype. What a child forked within a pass finds is no question of accesses.
ACCESSES := not (rule_equals_expression and (-1- or -5-)) and not optimizer_equals_expression \
  and not (special_values and not masters) and not fork_in_the_middle_of_a_pass \
  and not option_alone_through_functional and not where_in_a_tensor \
  and not (over_many_blocks and not float32) and not (over_more_than_128_blocks and not bare)
# Valgrind sees every AVX2 kernel with arrays of any end. Where the processor has AVX-512, that is left to it.
LEFT_OUT := $(shell grep -qs avx512vl /proc/cpuinfo && echo avx2)
preloaded = LD_PRELOAD="$$($(CXX) -print-file-name=$(1)) $$($(CXX) -print-file-name=libstdc++.so)" \
  PYTHONPATH="$(CURDIR)/build/$(2)"
MEMORY_ENV = $(call preloaded,libasan.so,sanitized) ASAN_OPTIONS=detect_leaks=0:abort_on_error=0 \
  UBSAN_OPTIONS=print_stacktrace=1
sanitize-memory: venv
	rm -rf build/sanitized
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) --no-deps --target build/sanitized -Cbuild-dir=build/sanitize \
	  -Cinstall.strip=false -Ccmake.define.ONEPASS_CUDA=OFF -Ccmake.define.ONEPASS_LEFT_OUT=$(LEFT_OUT) \
	  -Ccmake.define.ONEPASS_SANITIZE=address,undefined .
	$(MEMORY_ENV) $(BIN)/python -c 'import onepass; print("sanitized:", onepass.__file__)' | grep build/sanitized
	$(MEMORY_ENV) $(BIN)/python $(PYTEST) -m "not large" $(UNSANITIZED:%=--ignore tests/test_%.py) -k "$(ACCESSES)" \
	  $(ARGS)

# The interpreter is not instrumented, but its locks are seen, and so are allocations and copies of memory. Findings go
# to files, because a test that passes shows none. Kernels are the scalar ones: ThreadSanitizer knows no masked vector
# instruction, and sees each element this way. It wants addresses that are not random, where the system grants that.
THREADED_TESTS := tests/test_threads.py tests/test_processes.py tests/test_lifetime.py tests/test_batchnorm.py \
  tests/test_buffer_pool.py tests/test_whole_step.py
THREADED := thread or fork or process or at_once or snapshot_is_of_one_step
# Where a signal arrives, how a process ends or another begins, what a child forked within a pass finds: no questions of
# races.
RACED := ($(THREADED)) and not (processes and \
  (interrupt or signal or alarms or the_end or ends_a_process or interpreter or middle_of_a_pass)) \
  and not (arrays_alive and not (daemon or thread-local)) and not spawn and not forkserver
FIXED := $$(setarch -R true 2> /dev/null && echo setarch -R)
THREADS_ENV = $(FIXED) env $(call preloaded,libtsan.so,threads) \
  TSAN_OPTIONS=die_after_fork=0:history_size=4:log_path=$(CURDIR)/build/races/of
sanitize-threads: venv
	rm -rf build/threads build/races && mkdir -p build/races
	$(CXX) -std=c++20 -O1 -g -fsanitize=thread -Icsrc -pthread tests/cpp/stress_parallel.cpp csrc/cpu/parallel.cpp \
	  -o build/stress_parallel
	$(FIXED) build/stress_parallel
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(PIP) --no-deps --target build/threads -Cbuild-dir=build/sanitize-threads \
	  -Cinstall.strip=false -Ccmake.define.ONEPASS_CUDA=OFF -Ccmake.define.ONEPASS_SANITIZE=thread \
	  -Ccmake.define.ONEPASS_ONLY_SCALAR=ON .
	$(THREADS_ENV) $(BIN)/python -c 'import onepass; print("sanitized:", onepass.__file__)' | grep build/threads
	$(THREADS_ENV) $(BIN)/python $(PYTEST) $(THREADED_TESTS) -k "$(RACED)" $(ARGS) || \
	  { cat build/races/* 2> /dev/null; exit 1; }
	@if [ -n "$$(ls build/races)" ]; then cat build/races/*; exit 1; fi

# Valgrind knows no AVX-512 and hides it from the program, so this is a machine that has AVX2 alone, too. Vectors that
# are half within an array are errors as well. The kernels are those of the package.
MEMCHECKED ?= scalar avx2
MEMCHECK   := valgrind --quiet --error-exitcode=1 --track-origins=yes --partial-loads-ok=no
valgrind: $(KERNELS) ## one pass of every kernel, scalar and AVX2, under Valgrind's memcheck
	$(CXX) -std=c++20 -O1 -g -Icsrc tests/cpp/every_kernel.cpp $(KERNELS) -pthread -o build/every_kernel
	printf '%s\n' $(MEMCHECKED) | xargs -I{} -P $(JOBS) $(MEMCHECK) build/every_kernel {} $(MEMCHECKED)

# Processors of other years, by qemu-user: an interpreter of another name in .venv/bin, so that the processes which a
# test starts by sys.executable are emulated too. What the environment says of the real processor does not hold there.
# What QEMU has not of a model it prints at each start, unless told to leave it out.
QEMU_Nehalem := Nehalem
ISAS_Nehalem := scalar
QEMU_Haswell := Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid
ISAS_Haswell := scalar avx2
# What is bound to an instruction set: the choice of one, whole steps, batch normalization, threads, and without AVX every
# rule in every storage. Valgrind sees all AVX2 kernels on a machine that has AVX2 alone, so there the choice is left to
# show. Emulated, a test takes ten times as long. Objects are built and read by the real processor: no need to do it here.
EMULATED_Nehalem := tests/test_isa.py tests/test_worked_examples.py tests/test_threads.py \
  tests/test_storage.py::test_every_rule_in_every_storage \
  tests/test_storage.py::test_every_storage_with_all_that_rides_along \
  tests/test_batchnorm_bits.py::test_layer_equals_expression_over_batches
EMULATED_Haswell := tests/test_isa.py tests/test_worked_examples.py
EMULATED_TESTS := -k "not consumer and not kernel_units and not other_processors and not baseline_units \
  and not (every_rule and stochastic) and not (rides_along and not SGD) \
  and (not threads.py or any_number_of_threads or cut_a_tensor or exits or mode)"
# In a child of a process with threads, QEMU 7.2 fails an assertion of its own as soon as another thread starts
# (qemu_plugin_vcpu_init_hook), whatever the program is.
UNEMULATED := --deselect tests/test_threads.py::test_a_forked_child_steps_with_threads \
  --deselect tests/test_threads.py::test_a_child_forked_while_another_thread_steps \
  --deselect "tests/test_threads.py::test_multiprocessing[fork]" \
  --deselect tests/test_batchnorm.py::test_a_forked_child_goes_on \
  --deselect tests/test_batchnorm.py::test_a_child_forked_while_another_thread_is_in_another_layer \
  --deselect tests/test_buffer_pool.py::test_fork_while_other_threads_take_and_give
emulate: $(CPUS:%=emulate-%) ## tests on emulated processors without AVX-512 and without AVX; CPUS, ARGS

emulate-%: venv
	printf '#!/bin/sh\nunset OPENBLAS_CORETYPE\nexec qemu-x86_64 -cpu %s -0 "$$0" %s "$$@"\n' \
	  '$(or $(QEMU_$*),$*)' '"$(CURDIR)/$(BIN)/python"' > $(BIN)/python-$*
	chmod +x $(BIN)/python-$*
	$(BIN)/python-$* -m onepass
	test "$$($(BIN)/python-$* -c 'import onepass; print(*onepass.available_isas(), onepass.isa())')" = \
	  "$(ISAS_$*) $(lastword $(ISAS_$*))"
	$(BIN)/python-$* $(PYTEST) -m "not large" $(UNEMULATED) $(or $(ARGS),$(or $(EMULATED_$*),$(EMULATED_Nehalem)) $(EMULATED_TESTS))

# The installed package with another _cuda: the kernels for CUDA devices, compiled for the host, where a grid is a loop
# (tests/cuda_on_host). SANITIZE=address,undefined builds that with sanitizers.
ON_HOST := build/cuda_on_host
ON_HOST_SITE := $(CURDIR)/$(ON_HOST)/site
ON_HOST_ENV = $(if $(SANITIZE),$(call preloaded,libasan.so,cuda_on_host/site) ASAN_OPTIONS=detect_leaks=0) \
  PYTHONPATH="$(ON_HOST_SITE):$(CURDIR)/tests/cuda_on_host" \
  ONEPASS_CUDA_ON_HOST="$(CURDIR)/$(ON_HOST)/build/tests/cuda_on_host/libcuda_on_host.so"
cuda-on-host: venv ## the tests marked `cuda`, with the kernels for CUDA devices compiled for the host
	$(BIN)/cmake -S . -B $(ON_HOST)/build -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DONEPASS_PYTHON=ON \
	  -DONEPASS_CUDA_ON_HOST=ON -DONEPASS_SANITIZE=$(SANITIZE) -DPython_EXECUTABLE="$(CURDIR)/$(BIN)/python" \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)" > /dev/null
	$(BIN)/cmake --build $(ON_HOST)/build --parallel $(JOBS) --target _cuda cuda_on_host_selftest
	$(ON_HOST)/build/tests/cuda_on_host/cuda_on_host_selftest
	rm -rf $(ON_HOST)/site && mkdir -p $(ON_HOST)/site
	cp -r "$$($(BIN)/python -c 'import onepass, os; print(os.path.dirname(onepass.__file__))')" $(ON_HOST)/site
	rm -f $(ON_HOST)/site/onepass/_cuda.*.so
	cp $(ON_HOST)/build/_cuda.*.so $(ON_HOST)/site/onepass
	$(ON_HOST_ENV) $(BIN)/python -m onepass | grep 'built for the host'
	$(ON_HOST_ENV) $(BIN)/python $(PYTEST) tests/cuda_on_host
	$(ON_HOST_ENV) $(BIN)/python $(PYTEST) -m cuda $(or $(ARGS),$$(grep -l 'mark\.cuda' tests/test_*.py))

bench: ## all benchmarks, one after the other, and the report on them
	$(MAKE) --no-print-directory bench-micro
	$(MAKE) --no-print-directory bench-roofline
	$(MAKE) --no-print-directory bench-peers
	$(MAKE) --no-print-directory bench-report

# Peers have an environment of their own, with pinned versions; their compilers' caches are beside it.
PEERS     := build/bench-peers
PEERS_PIP := $(PEERS)/venv/bin/python -m pip install --disable-pip-version-check --quiet
PEERS_ENV := TORCHINDUCTOR_CACHE_DIR="$(CURDIR)/$(PEERS)/inductor" TORCH_EXTENSIONS_DIR="$(CURDIR)/$(PEERS)/extensions" \
  MAX_JOBS=$(JOBS)
$(PEERS)/.peers: bench/peers/requirements.txt bench/peers/requirements-deepspeed.txt
	$(PYTHON) -m venv --clear $(PEERS)/venv
	$(PEERS_PIP) -r bench/peers/requirements.txt
	$(PEERS_PIP) -r bench/peers/requirements-deepspeed.txt || echo "no DeepSpeed: its rows will say so"
	@touch $@

$(PEERS)/.installed: $(PEERS)/.peers $(WHEEL)/.built
	$(PEERS_PIP) $(WHEEL)/onepass-*.whl
	$(PEERS_PIP) --force-reinstall --no-deps $(WHEEL)/onepass-*.whl
	@touch $@

bench-peers: $(PEERS)/.installed ## side by side with NumPy, torch, DeepSpeed and Optax; ARGS goes to each script
	@status=0; for script in optimizers batchnorm whole_step sweeps; do \
	  $(PEERS_ENV) $(PEERS)/venv/bin/python bench/peers/$$script.py $(ARGS) || status=1; \
	done; exit $$status

# Instructions are the same in each run, however busy the machine is; Valgrind knows no AVX-512. The kernels are those of
# the package.
bench-guard: venv $(KERNELS) ## instructions per parameter against bench/instructions.json; ARGS=--update rewrites that
	$(BIN)/python bench/guard.py --library $(KERNELS) --cxx "$(CXX)" $(ARGS)

# The library and the C++ benchmarks, with no Python in them, and no kernel compiled twice. Files of results name the
# commit; what they are written over does not make it dirty.
BENCH := build/bench
define build_bench
$(BIN)/cmake -S . -B $(BENCH) -G Ninja -DCMAKE_MAKE_PROGRAM="$(CURDIR)/$(BIN)/ninja" -DCMAKE_BUILD_TYPE=Release \
  -DONEPASS_BENCH=ON > /dev/null
$(BIN)/cmake --build $(BENCH) --parallel $(JOBS) --target $(1)
endef
bench-micro: $(VENV)/.installed-lint ## every C++ kernel by itself, under google-benchmark, which takes ARGS
	$(call build_bench,micro)
	@mkdir -p bench/results
	ONEPASS_COMMIT="$$(git rev-parse HEAD)$$(git status --porcelain -- . ':!bench/results' | sed -n '1s/.*/-dirty/p')" \
	  $(BENCH)/bench/micro/micro --benchmark_out=bench/results/micro.json --benchmark_out_format=json $(ARGS)

bench-roofline: venv $(VENV)/.installed-lint ## what the machine can do, and where each rule stands on that
	$(call build_bench,roofline)
	$(BIN)/python bench/roofline.py $(ARGS)

bench-report: $(VENV)/.installed-demo ## draw the pictures and write the figures of docs/performance.md and the README
	$(BIN)/python bench/report.py $(ARGS)

fuzz: SECONDS = 60
fuzz: venv ## random programs, layouts and files against the promises, for SECONDS; SEED
	$(BIN)/python tests/fuzz/fuzz.py --seconds $(SECONDS) $(if $(SEED),--seed $(SEED))

free-threaded: ## the threading tests on a Python without interpreter lock, PYTHON_T, if there is one
	@if $(PYTHON_T) -c 'import sys; sys.exit(sys._is_gil_enabled())' 2> /dev/null; \
	then $(MAKE) --no-print-directory free-threaded-tests; \
	else echo "$(PYTHON_T) is no free-threaded Python: its tests are skipped"; fi

# Not all that the package depends on has free-threaded wheels; what these tests import has.
UNLOCKED := build/free-threaded/bin/python
free-threaded-tests:
	$(PYTHON_T) -m venv --clear build/free-threaded
	$(UNLOCKED) -m pip install --disable-pip-version-check --quiet --only-binary :all: hypothesis ml_dtypes numpy pytest
	CMAKE_BUILD_PARALLEL_LEVEL=$(JOBS) $(UNLOCKED) -m pip install --disable-pip-version-check --quiet --no-deps \
	  -Ccmake.define.ONEPASS_CUDA=OFF .
	PYTHON_GIL=0 $(UNLOCKED) -c 'import sys, onepass; sys.exit(sys._is_gil_enabled())'
	PYTHON_GIL=0 $(UNLOCKED) -m pytest $(THREADED_TESTS) -k "$(THREADED)" $(ARGS)

clean: ## remove everything that the targets made
	rm -rf build demo $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
