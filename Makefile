# make demo, make test: each creates .venv, installs, runs; the second call is quick.
# TORCH= picks another torch (then remove .venv first), for example: make demo TORCH="torch>=2.11"
TORCH ?= torch==2.13.0
PYTHON ?= $(shell for p in python3 python3.12 python3.11; do $$p -c 'import sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' 2>/dev/null && echo $$p && break; done)
VENV := .venv
PY := $(VENV)/bin/python

.PHONY: demo test lint clean

demo: $(VENV)/installed
	$(PY) -m specdec demo --drafter "specdec medusa=medusa.tiny_heads:tiny_drafter"

test: $(VENV)/installed
	$(PY) -m pytest --numprocesses auto --dist loadfile

lint: $(VENV)/installed
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

$(VENV)/installed: pyproject.toml
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 is needed; set PYTHON=/path/to/python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --upgrade pip
	$(PY) -m pip install --quiet "$(TORCH)"
	$(PY) -m pip install --quiet --editable ".[demo,test]"
	touch $@

clean:
	rm -rf $(VENV) build *.egg-info
