# Every target makes .venv first, which takes no time when nothing changed.
VENV   ?= .venv
PYTHON := $(VENV)/bin/python
INSTALL = python3 scripts/install.py --venv $(VENV)
# Unit tests share nothing and often wait, so three at a time on two cores; a test with servers has the
# machine to itself.
UNIT    = $(PYTHON) -m pytest -q -n 3 --dist worksteal test/unit

.PHONY: help install demo test chaos fuzz check docs bench clean

help:
	@echo "make demo     router, prefill and decode serve a conversation (KEEP=1 leaves them up, CACHING=all compares)"
	@echo "make test     everything, with real servers"
	@echo "make chaos    servers are killed, cut off and confused under load, and a table of what became of each request"
	@echo "make fuzz     odd requests to real servers, and pairs compared with one server (MINUTES=10 SEED=, ONLY=)"
	@echo "make check    lint, types, layering, documentation and unit tests: about three minutes"
	@echo "make docs     the documentation as a site in build/site, its reference pages written anew from the code"
	@echo "make bench    the whole evaluation, with one report (PARTS='steps stock' for some of it; says how long, goes on where it was)"
	@echo "make install  only $(VENV)"

install:
	@$(INSTALL)

demo: install
	@$(PYTHON) scripts/demo.py $(if $(KEEP),--keep) $(if $(CACHING),--caching $(CACHING))

test:
	@$(INSTALL) --dev --mooncake --browser
	@$(UNIT)
	@$(PYTHON) -m pytest test --ignore test/unit

chaos:
	@$(INSTALL) --dev
	@FAULTS="$(FAULTS)" $(PYTHON) -m pytest -s test/chaos/real_servers.py $(if $(FAULTS),,test/chaos/test_fakes.py)

fuzz:
	@$(INSTALL) --dev
	@MINUTES="$(MINUTES)" SEED="$(SEED)" $(PYTHON) -m pytest -s test/fuzz/real_servers.py $(if $(ONLY),-k $(ONLY))

check:
	@$(INSTALL) --dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	MYPYPATH=benchmark:python $(VENV)/bin/mypy --strict benchmark/*.py benchmark/report/make.py
	NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	$(UNIT)

docs:
	@$(INSTALL) --dev
	@$(PYTHON) scripts/make_reference.py
	@NO_MKDOCS_2_WARNING=1 $(VENV)/bin/mkdocs build --quiet --strict
	@echo "open build/site/index.html"

bench:
	@$(INSTALL) --bench --mooncake
	@$(PYTHON) benchmark/paper.py $(if $(OUT),-o $(OUT)) $(if $(AGAINST),--against $(AGAINST)) $(if $(PARTS),--parts $(PARTS))

clean:
	rm -rf $(VENV) models logs build
