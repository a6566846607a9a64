# make demo, make test: each creates .venv, installs the versions that were tested, runs; the second call is quick.
# make thorough: the cases of crossed arguments that make test leaves out, which takes one for each value of each argument.
# make thorough, scripts, seam, notebooks, families: what .ci/run does besides; the last three on the oldest and the newest
# supported releases of transformers (notebooks: the newest).
# make canary: the seam on whatever is newest today. make constraints: newest versions into .ci/constraints/*.txt.
# PYTHON= picks another Python and CONSTRAINTS= another file of versions for .venv (remove .venv first).
CONSTRAINTS ?= .ci/constraints/tested.txt
PYTHON ?= $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do $$p -c 'import sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null && echo $$p && break; done)
# files in the order that tests/conftest.py gives them, in which the longest ones come first
PYTEST := -m pytest --numprocesses auto --dist loadfile --no-loadscope-reorder
PACKAGES := --editable ".[demo,test]"

.PHONY: demo test thorough scripts seam notebooks families canary constraints lint clean

demo: .venv/installed
	.venv/bin/python -m specdec demo --drafter "specdec medusa=medusa.tiny_heads:tiny_drafter" \
		--drafter "specdec eagle3=specdec.tiny_eagle3:tiny_drafter" \
		--drafter "specdec dspark=specdec.tiny_dspark:tiny_drafter"

test: .venv/installed
	.venv/bin/python $(PYTEST) -m "not notebook and not scripts and not families and not thorough"

thorough: .venv/installed
	.venv/bin/python $(PYTEST) -m thorough

scripts: .venv/installed
	.venv/bin/python $(PYTEST) -m scripts

seam: .venv-oldest/installed .venv-newest/installed
	.venv-oldest/bin/python $(PYTEST) -m seam
	.venv-newest/bin/python $(PYTEST) -m seam

notebooks: .venv-newest/installed
	.venv-newest/bin/python $(PYTEST) tests/notebooks

families: .venv-oldest/installed .venv-newest/installed
	.venv-oldest/bin/python $(PYTEST) -m "families and not seam"
	.venv-newest/bin/python $(PYTEST) -m "families and not seam"

canary:
	$(call create,.venv-canary,--clear)
	.venv-canary/bin/python -m pip install --quiet --upgrade pip
	PYTHONWARNINGS="$(QUIET)" .venv-canary/bin/python -m pip install --quiet $(PACKAGES)
	.venv-canary/bin/python -m specdec info
	.venv-canary/bin/python $(PYTEST) -m seam

# all but those that need other versions or are large: peers, gptq, ray and eval
EXTRAS := kernels train notebooks grammar quant demo test

# uv finds one set of versions for all Pythons and systems; which CUDA packages a torch takes, that torch says itself
constraints:
	$(call create,.venv-constraints)
	.venv-constraints/bin/python -m pip install --quiet --upgrade uv
	for name in tested oldest newest; do \
	  .venv-constraints/bin/uv pip compile --quiet --universal --python-version 3.11 --fork-strategy fewest $(EXTRAS:%=--extra %) \
	    --no-header --no-annotate pyproject.toml .ci/constraints/$$name.in > .venv-constraints/$$name.txt || exit 1; \
	  { echo "# written by make constraints"; grep -vE '^(nvidia|cuda)-' .venv-constraints/$$name.txt; } > .ci/constraints/$$name.txt; \
	done

lint: .venv/installed
	.venv/bin/python -m ruff check .
	.venv/bin/python -m ruff format --check .
	.venv/bin/python -m mypy

# an environment for each file of versions, with a stamp that says it is complete
.venv/installed: pyproject.toml $(CONSTRAINTS)
	$(call install,.venv,$(CONSTRAINTS))

.venv-%/installed: pyproject.toml .ci/constraints/%.txt
	$(call install,.venv-$*,.ci/constraints/$*.txt)

QUIET := ignore:Editable installation# setuptools prints ten lines about every one

define create
@test -n "$(PYTHON)" || { echo "Python 3.11 to 3.14 is needed; set PYTHON=/path/to/python3.11"; exit 1; }
$(PYTHON) -m venv $(2) $(1)
endef

define install
$(call create,$(1))
$(1)/bin/python -m pip install --quiet --upgrade --constraint $(2) pip
PYTHONWARNINGS="$(QUIET)" $(1)/bin/python -m pip install --quiet --constraint $(2) --build-constraint $(2) $(PACKAGES)
touch $(1)/installed
endef

clean:
	rm -rf .venv .venv-* build *.egg-info
