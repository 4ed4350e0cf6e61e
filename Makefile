# Two commands for a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow lint test-transformers4 clean

demo: $(VENV)/.demo
	$(VENV)/bin/fs-plugins demo

test: $(VENV)/.dev
	$(VENV)/bin/python -m pytest

slow: $(VENV)/.dev
	$(VENV)/bin/python -m pytest -m slow

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

$(VENV)/.demo: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.demo

# The oldest supported transformers, in an environment of its own.
test-transformers4: $(VENV)4/.dev
	$(VENV)4/bin/python -m pytest tests/test_vision.py tests/test_enable.py tests/test_shipped.py tests/test_cli.py

$(VENV)4/.dev: pyproject.toml constraints.txt
	test -d $(VENV)4 || $(PYTHON) -m venv $(VENV)4
	sed -e 's/^transformers==.*/transformers==4.57.6/' -e 's/^tokenizers==.*/tokenizers==0.22.2/' \
	    -e 's/^diffusers==.*/diffusers==0.39.0/' -e 's/^huggingface_hub==.*/huggingface_hub==0.36.2/' \
	    constraints.txt > $(VENV)4/constraints.txt
	$(VENV)4/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)4/constraints.txt -e ".[dev]"
	touch $@

clean:
	rm -rf $(VENV) $(VENV)4 build dist *.egg-info
