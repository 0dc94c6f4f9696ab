# Two commands set everything up on a fresh machine: `make demo` runs the main job, `make test` runs the tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
WORKERS ?= 2
TORCH := $(shell sed -n 's/^torch==//p' constraints.txt)
LOCK := constraints-hashes.txt

.PHONY: demo test test-all lint types docs slow other-tools floors pythons lock release clean

demo: $(VENV)/.ready
	$(BIN)/stethoscope benchmark

# several files at a time, each process with one thread: small models are no faster with more
test: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile

test-all: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/pytest --numprocesses $(WORKERS) --dist loadfile -m "slow or not slow"

lint: $(VENV)/.ready
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

# the package as it is installed, where adapters/ and tasks/ stand inside it, with all scripts and examples;
# those of scripts/bench import one another by their bare names, the rest have the names of their folders
types: $(VENV)/.ready
	rm -rf build/types build/lib
	$(BIN)/pip install --quiet --no-deps --no-build-isolation --target build/types .
	cd build/types && MYPYPATH=.:../../scripts/bench:../.. ../../$(BIN)/mypy --config-file ../../pyproject.toml \
		--cache-dir ../mypy-cache --explicit-package-bases stethoscope ../../scripts ../../examples

# the site in build/site; any warning is an error
docs: $(VENV)/.ready
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

# everything is taken only with the SHA-256 that the lock file has, but for torch (and what its builds for GPUs bring):
# by its exact version alone, so that a CPU build that the machine offers is taken
$(VENV)/.ready: pyproject.toml constraints.txt $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and f"Python 3.11 or newer is needed, $(PYTHON) is {sys.version.split()[0]}; name another one: make PYTHON=python3.12")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-deps --require-hashes --requirement $(LOCK)
	$(BIN)/pip install --quiet --constraint constraints.txt torch
	PYTHONWARNINGS=ignore::UserWarning $(BIN)/pip install --quiet --no-deps --no-build-isolation --editable .
	touch $@

# for hours, by hand or at night: `.ci/run` has no time for it. Stopped, it goes on behind the last file that passed at
# this commit; `make slow MINUTES=30` is a part of it
MINUTES ?= inf
slow: $(VENV)/.ready
	OMP_NUM_THREADS=1 $(BIN)/python scripts/check/slow_tests.py --minutes $(MINUTES)
	$(if $(filter inf,$(MINUTES)),$(MAKE) floors pythons)

# tools that read what `stethoscope export` writes, each in an environment of its own, as their dependencies exclude ours:
# inspect-ai moves fsspec back; every-eval-ever needs Python 3.12 and an older huggingface-hub, its validator only three
EEE_PYTHON ?= python3.12
other-tools:
	$(PYTHON) -m venv build/other-tools/inspect-ai
	build/other-tools/inspect-ai/bin/pip install --quiet inspect-ai==0.3.285
	$(EEE_PYTHON) -m venv build/other-tools/every-eval-ever
	build/other-tools/every-eval-ever/bin/pip install --quiet pydantic rich requests
	build/other-tools/every-eval-ever/bin/pip install --quiet --no-deps every-eval-ever==0.3.0

# the part of the suite that speaks to other libraries: formats, fits, loggers, runs, images, the main job, the app
TRIED := tests/packaging/test_imports.py tests/unit/core tests/unit/storage tests/unit/loggers/test_loggers.py \
	tests/unit/detection/test_artifact.py tests/unit/detection/test_inference.py \
	tests/unit/detection/test_evidence_prior.py tests/integration/test_main_job.py tests/app/test_server.py

TRY = OMP_NUM_THREADS=1 pytest --numprocesses $(WORKERS) --dist loadfile $(TRIED)

# all lower bounds of pyproject.toml together, on the oldest Python
FLOOR_PYTHON ?= python3.11
floors:
	mkdir -p build
	$(FLOOR_PYTHON) scripts/floors.py > build/floors.txt
	$(FLOOR_PYTHON) -m venv build/floors
	build/floors/bin/pip install --quiet torch==$(TORCH)
	build/floors/bin/pip install --quiet --constraint build/floors.txt --editable ".[dev]"
	PATH="$(CURDIR)/build/floors/bin:$$PATH" $(TRY)

# the versions of the lock file on the newer Pythons
PYTHONS ?= python3.12 python3.13
pythons: $(foreach python,$(PYTHONS),$(notdir $(python))-tried)

%-tried:
	$(MAKE) VENV=build/$* PYTHON=$(filter %$*,$(PYTHONS)) build/$*/.ready
	PATH="$(CURDIR)/build/$*/bin:$$PATH" $(TRY)

# constraints-hashes.txt from constraints.txt and pyproject.toml. torch is left out, whose wheel is another one on every
# kind of machine; what all of its wheels need (the last four) is not
lock:
	mkdir -p build
	$(PYTHON) -m venv build/lock && build/lock/bin/pip install --quiet uv
	printf '%s\n' pip setuptools wheel sympy networkx jinja2 fsspec > build/lock.in
	echo torch > build/lock.excluded
	build/lock/bin/uv pip compile --quiet pyproject.toml build/lock.in --extra dev --universal --python-version 3.11 \
		--constraints constraints.txt --excludes build/lock.excluded --generate-hashes --no-header --no-annotate \
		--output-file $(LOCK)

# wheel, source archive and a bill of what they are built to run with (CycloneDX)
release: $(VENV)/.ready
	rm -rf dist
	$(BIN)/python -m build --outdir dist
	$(BIN)/python scripts/sbom.py dist

clean:
	rm -rf $(VENV) build dist *.egg-info
