# Two commands for a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
PIP = $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test slow lint test-transformers4 integration lmms example clean

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
	$(VENV)4/bin/python -m pytest tests/test_vision.py tests/test_enable.py tests/test_shipped.py tests/test_cli.py \
	    tests/test_towers.py

# The conformance kit on real classes: every framework in one environment, then the Hugging Face families on the oldest
# and the newest transformers; robust towers against the real open_clip. Writes docs/compatibility.md, also when something failed.
integration: $(VENV)-all/.ready $(VENV)4/.dev $(VENV)5/.ready
	rm -rf runs/integration; failed=0; \
	for venv in $(VENV)-all $(VENV)4 $(VENV)5; do \
	    $$venv/bin/python -m pytest integration --report runs/integration/run$$(basename $$venv).json || failed=1; \
	done; \
	$(VENV)-all/bin/python -m pytest tests/test_towers.py || failed=1; \
	$(VENV)-all/bin/python integration/matrix.py docs/compatibility.md runs/integration/*.json && exit $$failed

# lmms-eval is large, and wants a python-dateutil that its table writer can live with.
lmms: $(VENV)-lmms/.ready
	$(VENV)-lmms/bin/python -m pytest integration/test_lmms.py

$(VENV)-lmms/.ready: pyproject.toml constraints.txt
	test -d $(VENV)-lmms || $(PYTHON) -m venv $(VENV)-lmms
	grep -v '^python-dateutil==' constraints.txt > $(VENV)-lmms/constraints.txt
	$(VENV)-lmms/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)-lmms/constraints.txt \
	    -e ".[demo,testing]" lmms-eval==0.7.3
	touch $@

# docs/adapters.md's own commands: a stranger's plugin, installed beside the package (not from the checkout).
example:
	rm -rf .venv-example && $(PYTHON) -m venv .venv-example
	.venv-example/bin/python -m pip install -q -c constraints.txt ".[testing]" ./docs/example-plugin
	.venv-example/bin/pytest docs/example-plugin/tests
	.venv-example/bin/fs-plugins doctor

$(VENV)4/.dev: pyproject.toml constraints.txt
	test -d $(VENV)4 || $(PYTHON) -m venv $(VENV)4
	sed -e 's/^transformers==.*/transformers==4.57.6/' -e 's/^tokenizers==.*/tokenizers==0.22.2/' \
	    -e 's/^diffusers==.*/diffusers==0.39.0/' -e 's/^huggingface_hub==.*/huggingface_hub==0.36.2/' \
	    -e '/^sentence-transformers==/d' \
	    constraints.txt > $(VENV)4/constraints.txt
	$(VENV)4/bin/python -m pip install --quiet --disable-pip-version-check -c $(VENV)4/constraints.txt -e ".[dev]"
	touch $@

$(VENV)5/.ready: pyproject.toml constraints.txt
	test -d $(VENV)5 || $(PYTHON) -m venv $(VENV)5
	grep -v -E '^(transformers|tokenizers|huggingface_hub|safetensors)==' constraints.txt > $(VENV)5/constraints.txt
	$(VENV)5/bin/python -m pip install --quiet --disable-pip-version-check --upgrade -c $(VENV)5/constraints.txt -e ".[dev]"
	touch $@

# OpenFlamingo and the original LLaVA pin versions of torch and transformers that they do not need.
$(VENV)-all/.ready: pyproject.toml constraints.txt
	test -d $(VENV)-all || $(PYTHON) -m venv $(VENV)-all
	$(VENV)-all/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]" \
	    torchvision open_clip_torch einops einops-exts bitsandbytes
	$(VENV)-all/bin/python -m pip install --quiet --disable-pip-version-check --no-deps \
	    open_flamingo==2.0.1 llava-torch==1.2.2.post1
	touch $@

clean:
	rm -rf $(VENV) $(VENV)4 $(VENV)5 $(VENV)-all $(VENV)-lmms $(VENV)-example build dist *.egg-info
