# Everything runs inside .venv; nothing outside this folder is changed (except that `setup`, run as
# root on Debian or Ubuntu, installs the missing python3-venv package).

SHELL    := /bin/bash
ARGS     ?=
TESTED   := python3.13 python3.12 python3.11
PYTHON   ?= $(TESTED) python3
IMAGE    ?= flux-redux-server
VENV     := .venv
BIN      := $(VENV)/bin
RUNTIME  := $(VENV)/.installed
DEV      := $(VENV)/.installed-dev
MAKEFLAGS += --no-print-directory
export PIP_DISABLE_PIP_VERSION_CHECK := 1

comma := ,

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev serve demo test test-all test-pythons test-oldest test-clients test-pictures \
        chaos \
        soak mutate check lint format types imports dockerfile playground bench bench-server bench-hostile \
        bench-files bench-engine bench-attention bench-products bench-host bench-kernels bench-growth \
        bench-roofline bench-mini bench-open-tasks bench-previews gpu-report gpu-bundle gpu-tables train-mini \
        fit-preview eval-mini eval-approximations eval-controls docs docs-build docs-reference docker \
        clean

help:  ## show this list
	@if [ -t 1 ]; then bold=$$'\033[1m' plain=$$'\033[0m'; fi; \
	echo "FLUX Redux Server: $${bold}make serve$$plain starts it, $${bold}make test$$plain tests it."; echo; \
	awk -F ':.*## ' -v b="$$bold" -v p="$$plain" \
	  '/^[a-z-]+:.*## / {printf "  %s%-15s%s %s\n", b, $$1, p, $$2}' Makefile; echo; \
	echo 'Flags are passed on with ARGS, for example: make serve ARGS="--port 9000"'

# --- set up ---------------------------------------------------------------------------------------

setup: $(RUNTIME)  ## make .venv and install what the server needs
	@echo 'Ready. Next: make serve, or make demo'

setup-dev: $(DEV)  ## the same, plus what tests and checks need
	@echo 'Ready. Next: make test, or make check'

# Sets $$py to the first Python that is new enough; says when it is not one of those that are tested,
# and what to do when there is none, or when Debian's split packaging left out ensurepip. A .venv
# without a working Python is made anew.
define make_venv
	if ! $(BIN)/python -c 'import pip' 2>/dev/null; then \
	  py=; for name in $(PYTHON); do \
	    if "$$name" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then \
	      py=$$name; break; fi; done; \
	  if [ -z "$$py" ]; then \
	    echo 'Python 3.11 or newer is needed, and none was found (looked for: $(PYTHON)).'; \
	    echo 'Install one (Debian, Ubuntu: apt install python3 python3-venv), or name yours: make setup PYTHON=/path/to/python'; \
	    exit 1; fi; \
	  version=$$("$$py" -c 'import sys; print("python%d.%d" % sys.version_info[:2])'); \
	  case " $(TESTED) " in *" $$version "*) ;; *) \
	    echo "This is tested with $(TESTED), not with $$version: it may fail to install or to run."; \
	    echo 'To use another one: make setup PYTHON=/path/to/python';; esac; \
	  if ! "$$py" -c 'import ensurepip, venv' 2>/dev/null; then \
	    package=$$version-venv; \
	    if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null; then \
	      echo "Installing $$package, which $$py needs to make a virtual environment ..."; \
	      apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq "$$package" >/dev/null; \
	    else \
	      echo "$$py cannot make a virtual environment: its ensurepip module is missing."; \
	      echo "Install it (Debian, Ubuntu: sudo apt install $$package) and run make again."; exit 1; \
	    fi; fi; \
	  echo "Making $(VENV) with $$("$$py" --version) ..."; \
	  rm -rf $(VENV) && "$$py" -m venv $(VENV); \
	fi
endef

# $(call install,REQUIREMENT,NAME): quiet but for the large downloads; the whole story is in install.log.
# The versions are those of constraints.txt, but for what INSTEAD, another such file, has of its own.
INSTEAD ?=
define install
	@set -e; $(make_venv); \
	awk -F '[=;]' 'NR == FNR {known[$$1]; print; next} !($$1 in known)' \
	  $(INSTEAD) constraints.txt > $(VENV)/constraints.txt; \
	echo 'Installing $(2). The first time takes minutes: the CUDA build of torch is 3 GB ...'; \
	set -o pipefail; $(BIN)/pip install --no-input -c $(VENV)/constraints.txt -e '$(1)' 2>&1 \
	  | tee $(VENV)/install.log \
	  | awk '/^ *Downloading .*([0-9][0-9] MB|GB)\)/ {n = split($$2, part, "/"); print "  " part[n], $$3, $$4} \
	         /^Installing collected/ {print "  unpacking ..."} {fflush()}' \
	  || { tail -n 20 $(VENV)/install.log; echo 'Installing failed; all of it is in $(VENV)/install.log'; exit 1; }
endef

$(RUNTIME): pyproject.toml constraints.txt $(INSTEAD)
	$(call install,.[bench],the server)
	@touch $@

$(DEV): pyproject.toml constraints.txt $(INSTEAD)
	$(call install,.[bench$(comma)dev$(comma)cluster],the server and the development tools)
	@touch $@ $(RUNTIME)

# --- use ------------------------------------------------------------------------------------------

serve: $(RUNTIME)  ## start the server with the embedded model (ARGS="--help" lists the settings)
	@$(BIN)/flux-redux serve $(ARGS) || [ $$? -eq 130 ]  # 130: stopped with Ctrl-C

demo: $(RUNTIME)  ## make variations of a bundled picture in demo-output/, with a server of its own
	@$(BIN)/flux-redux demo --out demo-output $(ARGS)

docker:  ## build the container image (IMAGE=flux-redux-server)
	docker build -t $(IMAGE) $(ARGS) .

# --- develop --------------------------------------------------------------------------------------

# Much of a test's time is waiting, for servers, leases and clocks: so several files at once, in one
# process more than there are cores, with a thread each where torch computes. In the order that
# tests/conftest.py gives them: the slowest have few tests, and xdist would begin with those that
# have many. Bytecode is kept even where the environment forbids it, as images of Python's do: each
# process of hundreds would else compile the project and its tests anew.
PROCESSES ?= $(shell cores=$$(getconf _NPROCESSORS_ONLN 2>/dev/null || echo 1); echo $$((cores < 4 ? cores + 1 : 4)))
PYTEST    := PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) --dist loadfile --no-loadscope-reorder

test: $(DEV)  ## run the quick tests (what lacks hardware or a service is skipped, with its reason)
	@$(PYTEST) -m 'not slow and not clients and not pictures' $(ARGS)

test-all: $(DEV)  ## run the slow tests too (not those of test-clients and test-pictures)
	@$(PYTEST) -m 'not clients and not pictures' $(ARGS)

# Each in an environment of its own, .venv-3.13 and so on. A Python that is not there is no failure.
test-pythons:  ## run the quick tests with every tested Python that is found (5 GB of disk for each)
	@passed= failed= missing=; \
	for name in $(TESTED); do \
	  if ! "$$name" -c '' 2>/dev/null; then missing="$$missing $$name"; continue; fi; \
	  echo "Testing with $$("$$name" --version) ..."; \
	  if $(MAKE) test PYTHON="$$name" VENV=.venv-$${name#python}; then passed="$$passed $$name"; \
	  else failed="$$failed $$name"; fi; \
	done; \
	echo "passed:$${passed:- none}; failed:$${failed:- none}; not found:$${missing:- none}"; \
	[ -z "$$failed" ] && [ -n "$$passed" ]

# On a machine without a GPU, too, though this torch is the CUDA build.
test-oldest:  ## run the pipelines' and kernels' quick tests with the oldest torch that is allowed (6 GB of disk)
	@$(MAKE) test VENV=.venv-oldest INSTEAD=constraints-oldest.txt \
	  PYTHON="$(lastword $(TESTED)) $(PYTHON)" ARGS='tests/pipelines tests/kernels $(ARGS)'

# CLIENT_SOURCES names a folder with checkouts of clients that are in no registry.
test-clients: $(DEV)  ## run other people's clients, installed from PyPI and npm (2 GB), and write docs/internals/compatibility.md
	@$(BIN)/python -m pytest -m clients tests/clients tests/contract --compatibility-report docs/internals/compatibility.md $(ARGS)

# One file of tests, so not by file. What Debian lacks of encoders is skipped, and said.
test-pictures: $(DEV)  ## decode a corpus of generated pictures of every format, and compare pixels (encoders by apt: docs/internals/pictures.md)
	@OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(PROCESSES) -q -m pictures tests/pictures $(ARGS)

# Both start databases and brokers of their own on loopback, and kill them.
chaos: $(DEV)  ## kill everything at random under load, and see what clients lose (ARGS="--help")
	@cd tests && ../$(BIN)/python -m chaos.run storm --out ../bench-results $(ARGS)

soak: $(DEV)  ## mix all faults for 10 seeds x 2 minutes, and check what clients saw (ARGS="--help")
	@cd tests && ../$(BIN)/python -m chaos.run soak --out ../bench-results $(ARGS)

# In a copy of the project, so that a fault cannot stay.
mutate: $(DEV)  ## plant faults, one at a time, and see whether the tests notice (ARGS="signing no-fence")
	@cd tests && ../$(BIN)/python -m mutation.run $(ARGS)

check: lint types imports dockerfile playground docs-build  ## run every static check (make -k check: do not stop at the first)

lint: $(DEV)  ## ruff: rules and format
	@$(BIN)/ruff check . && $(BIN)/ruff format --check .

format: $(DEV)  ## ruff: repair what can be repaired
	@$(BIN)/ruff check --fix . ; $(BIN)/ruff format .

types: $(DEV)  ## mypy, strict
	@$(BIN)/mypy

imports: $(DEV)  ## import-linter: server -> pipelines -> kernels, weights on the side
	@$(BIN)/lint-imports

dockerfile: $(DEV)  ## hadolint
	@$(BIN)/hadolint Dockerfile && echo 'Dockerfile: no complaints'

# Its types and rules. Nothing of npm is served or needed to serve.
playground:  ## TypeScript and oxlint on the page's modules (left out, and said, where there is no npm)
	@if command -v npm >/dev/null; then \
	  cd tests/playground && npm ci --silent --no-fund --no-audit && npm run --silent check >&2 \
	    && echo 'Page: no complaints'; \
	else echo 'Page: types and rules were not checked, for there is no npm'; fi

# Material for MkDocs tells of its successor at each build.
MKDOCS := NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs

docs: $(DEV)  ## serve the documentation on http://127.0.0.1:8001
	@$(MKDOCS) serve --dev-addr 127.0.0.1:8001 $(ARGS)

docs-build: $(DEV)  ## build the documentation into site/, with every warning an error
	@$(MKDOCS) build --strict --quiet && echo 'Documentation: no complaints'

docs-reference: $(DEV)  ## write docs/reference from the code
	@$(BIN)/python docs/reference_pages.py

# Threads that wait a moment before they sleep: waking them costs a third of a training step, and
# spinning for long would take the cores from everything else.
QUIET_THREADS := OMP_WAIT_POLICY=PASSIVE GOMP_SPINCOUNT=20000

train-mini: $(DEV)  ## train the embedded model (hours; needs node and npm; ARGS="--help" lists the options)
	@cd weights && $(QUIET_THREADS) ../$(BIN)/python -W ignore -m training.train $(ARGS)

fit-preview: $(DEV)  ## fit the map from mini's latents to colours by which previews are made
	@cd weights && $(QUIET_THREADS) ../$(BIN)/python -W ignore -m training.preview $(ARGS)

eval-mini: $(DEV)  ## measure the embedded model on held-out icons: JSON and contact sheets (needs node and npm)
	@cd weights && $(QUIET_THREADS) ../$(BIN)/python -W ignore -m training.evaluate $(ARGS)

eval-approximations: $(DEV)  ## measure what tiers and fp8 cost, by mini, and write docs/performance/index.md
	@cd weights && $(QUIET_THREADS) ../$(BIN)/python -W ignore -m training.approximations --document ../docs/performance/index.md $(ARGS)

eval-controls: $(DEV)  ## measure strength, pooling, weights, fit, mask on photographs, and write docs/guide/controls.md
	@cd weights && $(QUIET_THREADS) ../$(BIN)/python -W ignore -m training.controls --document ../docs/guide/controls.md $(ARGS)

bench:  ## list the benchmarks
	@awk -F ':.*## ' '/^bench-[a-z-]+:.*## / {printf "  make %-15s %s\n", $$1, $$2}' Makefile

bench-server: $(RUNTIME)  ## measure the server alone, with a model that does nothing
	@$(BIN)/python server/benchmarks/bench_server.py $(ARGS)

bench-hostile: $(RUNTIME)  ## measure what a hostile API key costs others, the event loop and memory
	@$(BIN)/python server/benchmarks/bench_hostile.py $(ARGS)

bench-files: $(RUNTIME)  ## count the files that one submit and one whole request run through
	@$(BIN)/python server/benchmarks/count_files.py $(ARGS)

bench-engine: $(RUNTIME)  ## measure a step of the engine against diffusers' transformer, on random weights
	@$(BIN)/python pipelines/benchmarks/bench_engine.py $(ARGS)

bench-attention: $(RUNTIME)  ## measure every attention that this device can run, at FLUX's sizes
	@$(BIN)/python pipelines/benchmarks/bench_attention.py $(ARGS)

bench-products: $(RUNTIME)  ## measure a CPU's products through oneDNN against torch's own
	@$(BIN)/python pipelines/benchmarks/bench_products.py $(ARGS)

bench-host: $(RUNTIME)  ## measure the processor time that a step of full depth costs its process
	@$(BIN)/python pipelines/benchmarks/bench_host.py $(ARGS)

bench-kernels: $(RUNTIME)  ## measure each Triton kernel against what it replaces (needs an NVIDIA GPU)
	@$(BIN)/python kernels/benchmarks/bench_all.py $(ARGS)

bench-growth: $(DEV)  ## plot how time and memory grow with pixels, steps and images
	@$(BIN)/python -W ignore pipelines/benchmarks/bench_growth.py $(ARGS)

bench-roofline: $(RUNTIME)  ## print a lower bound on GPU times, from operation counts and data sheets
	@$(BIN)/python pipelines/benchmarks/roofline.py

bench-mini: $(RUNTIME)  ## measure the embedded model: loading, time per image, memory
	@$(BIN)/python -W ignore pipelines/benchmarks/bench_mini.py $(ARGS)

bench-open-tasks: $(RUNTIME)  ## measure what 1,000 open tasks cost the process of flux-redux bench
	@$(BIN)/python server/benchmarks/bench_open_tasks.py $(ARGS)

# Where nothing is installed, by whatever Python there is: see docs/performance/gpu-report.md.
ANY_PYTHON = $$([ -x $(BIN)/python ] && echo $(BIN)/python || echo python3)
GPU_REPORT := pipelines/benchmarks/gpu_report

bench-previews: $(RUNTIME)  ## measure what previews cost, of mini and at FLUX.1's sizes
	@$(BIN)/python -W ignore pipelines/benchmarks/bench_previews.py $(ARGS)

gpu-report:  ## measure FLUX.1 + Redux at full size on a GPU in 8 minutes, on random weights (ARGS="--help")
	@$(ANY_PYTHON) $(GPU_REPORT) $(ARGS)

gpu-bundle: $(DEV)  ## gather in gpu-bundle/ what a GPU machine without a network lacks for gpu-report
	@$(BIN)/python $(GPU_REPORT)/launch.py gpu_report.bundle $(ARGS)

gpu-tables:  ## write the GPU figures of README and docs from docs/benchmarks/gpu-report.json
	@$(ANY_PYTHON) $(GPU_REPORT)/launch.py gpu_report.tables $(ARGS)

clean:  ## delete .venv*, installed clients, caches and build results (never data/ or demo-output/)
	rm -rf $(VENV) .venv-3.* .venv-oldest .clients gpu-bundle dist build site .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache tests/playground/node_modules
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
