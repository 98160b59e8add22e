# The habits of this project. `make demo` and `make test` need Python >= 3.10, git and make, and nothing else.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
# A proxy that nobody runs: a notebook that asks the network fails at once.
OFFLINE := http_proxy=http://127.0.0.1:9 https_proxy=http://127.0.0.1:9 no_proxy=127.0.0.1,localhost

.DEFAULT_GOAL := help
.PHONY: help setup demo serve test lab export bench docs clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## /{printf "make %-8s %s\n", $$1, $$2}' Makefile

setup: $(READY)  ## Make .venv with everything in it (about 6 GB, one minute on a fast line)

$(READY): settings.ini setup.py pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	  { echo "$(PYTHON) is older than Python 3.10; name another one: make setup PYTHON=python3.12" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV) || \
	  { echo "python -m venv failed; on Debian and Ubuntu: sudo apt-get install python3-venv" >&2; exit 1; }
	$(BIN)/python -m pip install --quiet --disable-pip-version-check uv
	$(BIN)/uv pip install --quiet --python $(BIN)/python --editable '.[dev]'
	@touch $(READY)

demo: $(READY)  ## Data, training, evaluation, model and report on Mini Grocery
	$(BIN)/grocery demo

serve: runs/demo/model.pth.onnx  ## The demo's model behind the backend (port 8000) and the page (port 8050), until Ctrl-C
	$(BIN)/grocery serve --ui

runs/demo/model.pth.onnx: runs/demo/model.pth
	$(BIN)/grocery export runs/demo/model.pth

runs/demo/model.pth: | $(READY)
	$(BIN)/grocery demo

test: $(READY)  ## Notebooks (nbdev_test), then everything that crosses chapters (pytest)
	env -u GROCERY_DATA_DIR OMP_NUM_THREADS=1 $(OFFLINE) $(BIN)/nbdev_test --n_workers 2 --timing
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not browser"
	$(BIN)/python -m pytest -m browser

lab: $(READY)  ## Open the workbook in JupyterLab
	$(BIN)/jupyter lab --config=.jupyter/jupyter_lab_config.py nbs/index.ipynb

export: $(READY)  ## Notebooks -> package, and clean notebooks; after every change of a notebook
	$(BIN)/nbdev_export
	$(BIN)/nbdev_clean

bench: $(READY)  ## Ratios beside the course's own scripts, into benchmarks/results.json
	$(BIN)/python benchmarks/run.py

docs: $(READY)  ## Render the site into _site (needs Quarto >= 1.7)
	@command -v quarto >/dev/null || { echo "Quarto is not installed; see https://quarto.org/docs/get-started" >&2; exit 1; }
	PATH="$(CURDIR)/$(BIN):$$PATH" quarto render

clean:  ## Remove what can be made again, .venv excepted
	rm -rf _site _proc runs build *.egg-info .pytest_cache
