# make demo   a cohort, five networks, three kinds of maps: results under demo/
# make test   all tests
# make lint   formatting, rules and types
# Each creates what it needs in .venv first.

PYTHON ?= python3
PY := .venv/bin/python
DEMO := demo
# Eighty simulated scans at 2 mm and a network of 16 filters: enough to learn where the loss is.
COHORT := --subjects 80 --voxel 2 --seed 0
TRAIN := --model modelB16 --lr 1e-3 --wd 1e-3 --epochs 30 --patience 6 --precision bf16
.PHONY: demo test lint clean

demo: .venv/run
	$(PY) simulate.py --outpath $(DEMO)/cohort $(COHORT) --overwrite
	$(PY) train_cv.py --path $(DEMO)/cohort/data.csv --outpath $(DEMO)/models $(TRAIN) --overwrite
	for method in LRP IG GGC; do \
	    $(PY) heatmap.py --method $$method --modelpath $(DEMO)/models --outpath $(DEMO)/heatmaps --overwrite || exit; \
	done

test: .venv/dev
	$(PY) -m pytest

lint: .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy *.py bench

# The stamp files say which requirements the environment holds.
.venv/run: requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	touch $@

.venv/dev: requirements-dev.txt requirements.txt
	$(PYTHON) -m venv .venv
	$(PY) -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	touch $@ .venv/run

clean:
	rm -rf $(DEMO) .venv
