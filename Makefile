# make quickstart: train and measure a small model.  make test: run all tests.  make help: the rest.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

RUN := models/quickstart
REPORT := $(RUN)/report.html

.DELETE_ON_ERROR:
.PHONY: help where quickstart test lint clean
help:
	@echo "make quickstart   set up .venv, create text, train a tokenizer and a small Llama, and measure it"
	@echo "make test         set up .venv and run all tests"
	@echo "make lint         check style (ruff) and that generated files are up to date"
	@echo "make clean        remove .venv and tool caches; keep data/ and models/"

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: Python 3.11 or newer is needed; set PYTHON=python3.11 or the like")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# A finished quick start is shown again, an interrupted one is restarted.
quickstart: where $(INSTALLED)
	$(PY) create_synthetic_data.py --num-tokens 300000 --complexity medium --output-dir data/synthetic
	$(PY) train_tokenizer.py --data-dir data/synthetic/train --vocab-size 700 --output models/quickstart-tokenizer.json
	$(PY) train.py --config config/quickstart.yaml $(if $(wildcard $(RUN)/training_metrics.json),,--overwrite)
	@$(MAKE) --no-print-directory $(REPORT)

where:
	@echo "The report of the quick start: $(REPORT), complete when this command ends"

# Measure again only if the weights, the tasks, the code or the libraries have changed.
$(REPORT): $(RUN)/model.safetensors $(wildcard *.py babyllama/*.py babyllama/*/*.py babyllama/*/*.j2 config/benchmark*.yaml) requirements.txt
	$(PY) evaluate.py $(RUN)
	$(PY) benchmark.py $(RUN) --benchmark-config config/benchmark-quickstart.yaml --output $(RUN)/report.json

test: $(INSTALLED)
	$(PY) -m pytest

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m babyllama.config --check

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
