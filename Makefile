# make demo  - from unlabelled images to a detector, offline, on built-in pictures
# make test  - the test suite;  make slow - the tests it leaves out;  make check - lint and types
# make page  - the page of hf-vlm serve in a real browser, which the system brings: apt-get install chromium
# A plain pip equivalent of the set-up: pip install -c constraints.txt -e ".[dev]"
PYTHON ?= python3
VENV   := .venv
RUN    := $(VENV)/bin/python
STAMP  := $(VENV)/.installed
UV     := $(shell command -v uv)
ifneq ($(UV),)
CREATE  := uv venv --quiet --allow-existing --python "$(PYTHON)"
INSTALL := uv pip install --quiet --python $(RUN) -c constraints.txt
else
CREATE  := "$(PYTHON)" -m venv
INSTALL := $(RUN) -m pip install --quiet --disable-pip-version-check -c constraints.txt
endif

# uv looks for local wheels in UV_FIND_LINKS only, pip in PIP_FIND_LINKS
export UV_FIND_LINKS ?= $(PIP_FIND_LINKS)

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing into $(VENV) with $(if $(UV),uv,pip (about two minutes))"
	@$(CREATE) $(VENV)
	@$(INSTALL) -e ".[dev]"
	@touch $@

.PHONY: install demo test slow page check clean
install: $(STAMP)

demo: $(STAMP)
	$(RUN) -m hf_vlm.cli demo

test: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto --dist worksteal

slow: $(STAMP)
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow

page: $(STAMP)
	@test -x /usr/bin/chromium || { echo "There is no /usr/bin/chromium: apt-get install chromium"; exit 1; }
	@$(INSTALL) -e ".[page]"
	OMP_NUM_THREADS=1 $(RUN) -m pytest -m slow tests/deploy/test_app.py

check: $(STAMP)
	$(RUN) -m ruff check . && $(RUN) -m ruff format --check . && $(RUN) -m mypy

clean:
	rm -rf $(VENV) build dist runs .mypy_cache .pytest_cache .ruff_cache
