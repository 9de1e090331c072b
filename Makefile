# make test    the whole suite; needs pytest, which it puts into .venv
# make lint    ruff, mypy (strict on the three core files), shellcheck
# make check   both, with everything the dev extra has
PYTHON ?= python3
VENV ?= .venv
RUN = $(VENV)/bin/python -m

.PHONY: test lint check clean

test: $(VENV)/test
	$(RUN) pytest

lint: $(VENV)/dev
	$(RUN) ruff check .
	$(RUN) mypy
	shellcheck bus_listener.sh .ci/run

check: $(VENV)/dev lint
	$(RUN) pytest

$(VENV)/test:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q pytest
	touch $@

$(VENV)/dev: pyproject.toml | $(VENV)/test
	$(VENV)/bin/pip install -q -e '.[dev]'
	command -v shellcheck >/dev/null || { apt-get update -q && apt-get install -qy shellcheck; }
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
