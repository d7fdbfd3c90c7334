# "make quickstart" trains and measures a small model, "make test" runs the tests, "make help" lists the rest.
PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

RUN := models/quickstart
REPORT := $(RUN)/report.html

.DELETE_ON_ERROR:
.PHONY: help quickstart report-path race test test-reliability lint clean
help:
	@echo "make quickstart   set up .venv, create text, train a tokenizer and a small Llama, measure the model"
	@echo "make race         train config/race-30min.yaml and a plain Trainer script for 30 minutes each on"
	@echo "                  data/train, or on RAW=DIR with raw train/ and dev/; BLIMP=DIR measures grammar"
	@echo "make test         set up .venv and run all tests but the slow ones"
	@echo "make test-reliability   kill, damage and flood real runs, and report on fifteen promises"
	@echo "make lint         check the style (ruff), and that the generated files are up to date"
	@echo "make clean        remove .venv and the tools' caches, but keep data/ and models/"

$(INSTALLED): requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "error: this needs Python 3.11 or newer; choose one with, for example, make PYTHON=python3.11 quickstart")'
	$(PYTHON) -m venv $(VENV)
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

# If the quick start is finished, train.py shows its results again; if it was interrupted, it starts over.
quickstart: report-path $(INSTALLED)
	$(PY) create_synthetic_data.py --num-tokens 300000 --complexity medium --output-dir data/synthetic
	$(PY) train_tokenizer.py --data-dir data/synthetic/train --vocab-size 700 --output models/quickstart-tokenizer.json
	$(PY) train.py --config config/quickstart.yaml $(if $(wildcard $(RUN)/training_metrics.json),,--overwrite)
	@$(MAKE) --no-print-directory $(REPORT)

report-path:
	@echo "The results will be in $(REPORT) when this command has finished."

# Measuring takes a while, so do it again only if the weights, the tasks, the code or the libraries have changed.
$(REPORT): $(RUN)/model.safetensors $(wildcard *.py babyllama/*.py babyllama/*/*.py babyllama/*/*.j2 config/benchmark*.yaml) requirements.txt
	$(PY) evaluate.py $(RUN)
	$(PY) benchmark.py $(RUN) --benchmark-config config/benchmark-quickstart.yaml --output $(RUN)/report.json

# Text that prepare_data.py has cleaned is in data/; raw text costs both contestants the time to clean it.
MINUTES := 30
RAW :=
BLIMP :=
race: $(INSTALLED)
	$(PY) experiments/race.py --minutes $(MINUTES) $(if $(RAW),--raw $(RAW)) $(if $(BLIMP),--blimp $(BLIMP))

# A file of tests stays in one process, because its tests share models.
test: $(INSTALLED)
	$(PY) -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile

# Includes the slow tests, which "make test" leaves out.
test-reliability: $(INSTALLED)
	$(PY) -m pytest -m "" --numprocesses 2 --dist loadfile tests/reliability

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m babyllama.config --check

clean:
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -prune -exec rm -rf {} +
