# make quick   what the core does and whether it keeps PROTOCOL.md, in less than a minute
# make test    the whole suite, three tests at a time, in less than 8 minutes; `python -m pytest` needs pytest alone
# make lint    ruff, mypy (strict on the three core files), shellcheck
# make check   both, with everything the dev extra has, and the slowest tests listed
# make profile where each microsecond of a send goes: docs/profile.txt (PROFILE="--python PATH")
# make bench   how fast, beside its peers: docs/performance.md; ROWS="sixteen batches" for some rows, BENCH=--quick to look
#              (Debian, as root: installs the peers; about half an hour, on a machine that does nothing else)
# make fuzz    a million raw requests, requests made of the schema, ten minutes guided by coverage; about 20 minutes
# make faults  every fault in full, as root for all of them, in about two hours; writes docs/reliability.md
# make siege   its longest row alone, an hour of everything at once; SECONDS=60 for a look, SEED=n for the same again
# make cluster three nodes and two fronts, and all that can fail, as root in about an hour; writes the end of docs/cluster.md;
#              ROWS="kill-leader cancel" for some rows; needs what deploy/cluster/README.md installs
# make page    much for the page: 100,000 messages, five minutes of more; is its memory flat? PAGE_SECONDS=30 for a look; needs chromium
# make agents  the newest agent programs from npm, each with what install writes for it; writes docs/agents.md
PYTHON ?= python3
PAGE_SECONDS ?= 300
VENV ?= .venv
RUN = $(VENV)/bin/python -m
FUZZ = $(HOME)/.cache/agent-bus-fuzz
FUZZ_PYTHON ?= $(PYTHON)  # atheris has wheels for 3.9 to 3.13, Linux on x86-64
AT_ONCE ?= 3  # tests
# A file's tests stay together: some share a server, or thousands of readers. The order is that of tests/conftest.py.
TOGETHER = -n $(AT_ONCE) --dist loadfile --no-loadscope-reorder $(DEAD_WORKER)
# A worker that dies ends the run and names its test. Else xdist begins the same test anew, eight times, and then waits.
DEAD_WORKER = --max-worker-restart 0
# One to three tests that failed may have lost a race with those beside them: the output names them. Alone each must pass.
FAILED = $$(grep -c :: .pytest_cache/v/cache/lastfailed)
ALONE = { test $$? = 1 && test $(FAILED) -le 3 && $(RUN) pytest -v --last-failed --last-failed-no-failures none; }
# The core's own files whose tests start a command, a proxy or another server each.
LONG = deploy operations damage conformance server identity tokens
PEERS = wrk redis-server redis-tools mosquitto nginx libnginx-mod-nchan beanstalkd

.PHONY: quick test lint check bench profile fuzz faults siege cluster page agents clean

quick: $(VENV)/test
	REPLAY_LISTS=30 $(RUN) pytest -n $(AT_ONCE) --dist worksteal $(DEAD_WORKER) -m 'not slow' $(LONG:%=--ignore=tests/core/test_%.py) test_bus.py tests/core

test: $(VENV)/test
	$(RUN) pytest $(TOGETHER)

lint: $(VENV)/dev
	$(RUN) ruff check .
	$(RUN) mypy
	$(VENV)/bin/shellcheck bus_listener.sh .ci/run deploy/cluster/node.sh deploy/cluster/one_machine.sh

check: $(VENV)/dev lint
	$(RUN) pytest $(TOGETHER) --cache-clear --durations 20 || $(ALONE)

bench: $(VENV)/bench
	$(RUN) bench $(BENCH) $(ROWS)

profile: $(VENV)/bench
	$(RUN) bench.profile $(PROFILE)

fuzz: $(FUZZ)/ready
	$(FUZZ)/bin/python -m tests.fuzz

faults: $(VENV)/dev $(FUZZ)/ready
	$(RUN) tests.faults

siege: $(VENV)/dev
	$(RUN) tests.faults siege$(SECONDS:%=\=%)

cluster: $(VENV)/dev
	$(RUN) tests.ledgers $(ROWS)

page: $(VENV)/dev
	$(VENV)/bin/pip install -q -e '.[page]'
	PAGE_SECONDS=$(PAGE_SECONDS) $(RUN) pytest tests/extensions/test_page_much.py

agents: $(VENV)/test
	$(RUN) tests.integrations.agents

$(VENV)/test:
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install -q pytest pytest-xdist
	touch $@

$(VENV)/dev: pyproject.toml | $(VENV)/test
	$(VENV)/bin/pip install -q -e '.[dev]'
	touch $@

# RUNLEVEL=1: the packages come without their services being started
$(VENV)/bench: pyproject.toml | $(VENV)/test
	$(VENV)/bin/pip install -q -e '.[bench]'
	apt-get update -q && RUNLEVEL=1 apt-get install -qy --no-install-recommends $(PEERS)
	touch $@

$(FUZZ)/ready: pyproject.toml
	$(FUZZ_PYTHON) -m venv $(FUZZ)
	$(FUZZ)/bin/pip install -q -e '.[fuzz]'
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
