# make demo [MODEL=folder] [DATA=file]   the whole method on this machine
# make test                              every check and test
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup demo paper test lint gpu-check bench bench-gpu clean

VENV_PYTHON := .venv/bin/python

help:  ## this list
	@sed -n 's/^\([a-z-]*\):[^#]*## \(.*\)/  make \1\t\2/p' $(MAKEFILE_LIST) | expand -t 20

setup:  ## make .venv and install everything, pinned (the other targets do it too, once)
	@tools/setup_env.sh

demo: setup  ## run the whole method; MODEL=folder starts from that model, DATA=file adds your own preference pairs
ifdef DATA
	$(if $(MODEL),,$(error DATA needs MODEL=folder as well: the model that the pairs are to align))
	.venv/bin/aligndistil pipeline --config examples/demo/preferences.yaml --vars.initial $(MODEL) --vars.data $(DATA)
else ifdef MODEL
	.venv/bin/aligndistil pipeline --config examples/demo/pretrained.yaml --vars.initial $(MODEL)
else
	.venv/bin/aligndistil pipeline --config examples/demo/pipeline.yaml
endif

paper: setup  ## the paper's tables in small, about 70 minutes; MODEL=folder DATA="files" JUDGE=folder: with that model
	$(VENV_PYTHON) examples/paper/paper.py $(if $(MODEL),--model $(MODEL),--out docs/results/paper) \
	    $(if $(DATA),--data $(DATA)) $(if $(JUDGE),--judge $(JUDGE))

test: lint  ## lint, then every test; those that need a GPU are skipped where there is none
	OMP_NUM_THREADS=1 $(VENV_PYTHON) -m pytest

lint: setup  ## ruff and mypy
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
	$(VENV_PYTHON) -m mypy

gpu-check: setup  ## run the tests marked gpu and write what was seen to docs/results/
	$(VENV_PYTHON) tools/gpu_check.py

bench: setup  ## time, memory and communication of the loss on this machine's CPU, into docs/results/loss
	$(VENV_PYTHON) -m benchmarks.loss --out docs/results/loss

bench-gpu: setup  ## the same on its GPU, into docs/results/loss-gpu
	$(VENV_PYTHON) -m benchmarks.loss --cuda --out docs/results/loss-gpu

clean:  ## remove .venv, runs/ and caches
	rm -rf .venv runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
