# make demo  - from unlabelled images to a detector, offline, on built-in pictures
# make test  - the test suite;  make slow - the tests it leaves out;  make check - lint and types
# A plain pip equivalent of the set-up: pip install -c constraints.txt -e ".[dev]"
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed

# uv looks for local wheels in UV_FIND_LINKS only, pip in PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

$(STAMP): pyproject.toml constraints.txt
	@if command -v uv >/dev/null 2>&1; then \
	  echo "Installing into $(VENV) with uv"; \
	  uv venv --quiet --allow-existing --python "$(PYTHON)" $(VENV) && \
	  uv pip install --quiet --python $(RUN) -c constraints.txt -e ".[dev]"; \
	else \
	  echo "Installing into $(VENV) with pip (about two minutes)"; \
	  "$(PYTHON)" -m venv $(VENV) && \
	  $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"; \
	fi
	@touch $@

.PHONY: install demo test slow check clean
install: $(STAMP)

demo: $(STAMP)
	$(RUN) -m hf_vlm.cli demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow

check: $(STAMP)
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .pytest_cache .ruff_cache
