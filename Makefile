# Each target makes what it needs: a virtual environment in .venv with the core built. Nothing else has to be installed
# by hand but python3 with pip and a C compiler.
PYTHON ?= python3
BIN := .venv/bin
CORE := pyproject.toml setup.py src/statbuffer/_table/_native.pyx

.PHONY: demo test lint bench torture build clean

demo: .venv/app.stamp            ## count realistic traffic into demo.db, or a log of yours: make demo LOG=access.log
	@$(BIN)/statbuffer demo $(if $(LOG),--log "$(LOG)")

test: .venv/dev.stamp            ## all tests but the long campaigns, with coverage
	STATBUFFER_TABLE=native $(BIN)/pytest -m "not torture" --cov --cov-report=term --cov-fail-under=95 $(ARGS)

lint: .venv/dev.stamp
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: .venv/bench.stamp         ## one table of ratios; make bench ARGS=increment for one section
	@$(BIN)/python -m bench $(ARGS)

torture: .venv/dev.stamp         ## the long campaigns
	$(BIN)/pytest -m torture -s --timeout=0 $(ARGS)

build: .venv/dev.stamp           ## wheel and sdist into dist/
	$(BIN)/python -m build

clean:
	rm -rf .venv build dist *.egg-info src/*.egg-info src/statbuffer/_table/_native.c src/statbuffer/_table/_native*.so

.venv/pip.stamp:
	$(PYTHON) -m venv .venv || { rm -rf .venv && $(PYTHON) -m venv --without-pip .venv && $(PYTHON) -m pip --python $(BIN)/python install -q pip; }
	$(BIN)/python -m pip install -q --upgrade "pip>=25.1"
	@touch $@

.venv/app.stamp: .venv/pip.stamp $(CORE)
	$(BIN)/python -m pip install -q --editable ".[cli]"
	@touch $@

.venv/dev.stamp: .venv/pip.stamp $(CORE)
	$(BIN)/python -m pip install -q --editable ".[all]" --group test --group lint --group build --group bench
	@touch $@ .venv/app.stamp

.venv/bench.stamp: .venv/pip.stamp $(CORE)
	$(BIN)/python -m pip install -q --editable ".[all]" --group test --group bench
	@touch $@ .venv/app.stamp
