# make demo | test | lint | soak: each makes .venv and installs what it needs; a second run is fast.
# make gpu uses what PYTHON has (CUDA, torch, pytest) and installs nothing; DRY=1 lists its plan,
# ONLY="step memory" gives the named steps all of its nine minutes, RESUME=1 passes over what is done.
# They work from a fresh clone on a bare machine with Python 3.11 or later, make and git.

PYTHON ?= python3
VENV := .venv
RUN := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE TOKENIZERS_PARALLELISM=false $(VENV)/bin/python
PIP := $(VENV)/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt
# Each process takes about 1.5 GB; a file's tests share what they make, so they stay together.
IN_PARALLEL := --numprocesses auto --maxprocesses 4 --dist loadfile

.PHONY: demo test lint soak gpu clean

demo: $(VENV)/.run
	$(VENV)/bin/python -m fastdpo.train

test: lint
	$(RUN) -m pytest $(IN_PARALLEL) --durations=8

lint: $(VENV)/.dev
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyrefly check --python-interpreter-path $(VENV)/bin/python

soak: $(VENV)/.dev
	$(RUN) -m pytest $(IN_PARALLEL) --soak --durations=20 --timeout=3600

gpu:
	PYTHONPATH=kernels$${PYTHONPATH:+:$$PYTHONPATH} HF_HUB_OFFLINE=1 $(PYTHON) -m bench.gpu $(if $(DRY),--dry) $(if $(RESUME),--resume) $(if $(ONLY),--only $(ONLY))

# torch alone first: its pinned CPU or CUDA wheel, before anything else can ask for another one.
$(VENV)/.run: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(PIP) torch
	$(PIP) --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.run
	$(PIP) --editable '.[dev]'
	touch $@

clean:
	rm -rf $(VENV) build dist *.egg-info fastdpo-demo fastdpo-output
