# make demo       a cohort, five networks, their maps, an SVM, and how all agree with the truth: under demo/
# make demo-null  the same people without any planted loss: what is left is chance
# make demo-floors  after the demo: every other method, and networks trained on permuted labels as a third floor
# make demo-sanity  after the demo: its last table of four scans a fold and three draws
# make bench      speed and memory against the published way; bench-quick: of a small network
# make device DEVICE=0  what a device computes, against float64 on the CPU, and whether it waits for scans
# make slopes     how time and memory grow with subjects, steps and voxels, and the comparison at 1 mm, about 25 minutes
# make rows       what a list of 40,000 scans takes every command before its first scan of work, about 10 minutes
# make new-scans  after the demo: people that its networks never saw, and scans that are not what they should be
# make torture    kills training, maps, their checks and a job array at random moments, and compares
# make sharing    torchrun and parts against a single process each: every file
# make test       all tests
# make slurm-test  slurm/submit.sh on a Slurm of this machine's own, disturbed and compared; about 5 minutes
# make fuzz       random damage to every file that is read: a result or a clear error; about 10 minutes
# make lint       formatting, rules and types
# Each creates what it needs in .venv first.

PYTHON ?= python3
PY := .venv/bin/python
DEMO := demo
# Eighty simulated scans and a network of eight filters: small enough for two cores, large enough that
# the networks learn where the loss is. Their loss stays flat for several epochs first, hence the patience.
SEED := 0
COHORT = --subjects 80 --voxel 2 --severity 2 --seed $(SEED)
TRAIN := --model modelB8 --lr 1e-3 --wd 1e-3 --batch 4 --epochs 16 --patience 12
METHODS := LRP GGC IG Gradient SmoothGrad
.PHONY: demo demo-null demo-floors demo-sanity bench bench-quick device slopes rows new-scans torture sharing test slurm-test fuzz lint clean

# maps of trained or untrained networks: $(call maps,folder of the networks,trained or random,methods,options)
maps = $(PY) heatmap.py --method $3 --weights $2 --modelpath $1 --outpath $(DEMO)/heatmaps --overwrite $4
compare = $(PY) overlap.py --maps $(DEMO)/heatmaps --reference $(DEMO)/cohort/truth.nii.gz \
    --mask $(DEMO)/cohort/mask.nii.gz --overwrite
check = $(PY) sanity.py --maps $(DEMO)/heatmaps --modelpath $(DEMO)/models --mask $(DEMO)/cohort/mask.nii.gz \
    --overwrite --orders

demo demo-null: .venv/run
	$(PY) simulate.py --outpath $(DEMO)/cohort $(COHORT) --overwrite
	$(PY) train_cv.py --path $(DEMO)/cohort/data.csv --outpath $(DEMO)/models $(TRAIN) --overwrite
	$(call maps,$(DEMO)/models,trained,$(METHODS),--steps 50)
	$(call maps,$(DEMO)/models,random,$(METHODS),--steps 50)
	$(call maps,$(DEMO)/models,trained,IG,--baseline controls --steps 50)
	$(call maps,$(DEMO)/models,random,IG,--baseline controls --steps 50)
	$(PY) svm.py --modelpath $(DEMO)/models --outpath $(DEMO)/heatmaps --overwrite
	$(PY) ttest.py --modelpath $(DEMO)/models --outpath $(DEMO)/heatmaps --overwrite
	$(compare)
	$(check) --scans-per-fold 1 --repeats 1

OTHERS := InputXGradient GradCAM Occlusion
demo-floors: .venv/run
	$(PY) train_cv.py --path $(DEMO)/cohort/data.csv --outpath $(DEMO)/permuted $(TRAIN) --permute-labels --overwrite
	$(call maps,$(DEMO)/permuted,trained,$(METHODS) $(OTHERS),--steps 50)
	$(call maps,$(DEMO)/permuted,trained,IG,--baseline controls --steps 50)
	$(call maps,$(DEMO)/permuted,trained,LRP,--rule composite)
	for weights in trained random; do \
	    $(call maps,$(DEMO)/models,$$weights,$(OTHERS)) && \
	    $(call maps,$(DEMO)/models,$$weights,LRP,--rule composite) || exit; \
	done
	$(compare)

demo-sanity: .venv/run
	$(check)

demo-null: DEMO := $(DEMO)/null
demo-null: COHORT += --null

bench: .venv/run
	$(PY) bench/speed.py --profile

bench-quick: .venv/run
	$(PY) bench/speed.py --profile --quick

DEVICE := auto
device: .venv/run
	$(PY) bench/device.py --device $(DEVICE)

slopes: .venv/run
	$(PY) bench/slopes.py

rows: .venv/run
	$(PY) bench/rows.py

new-scans: .venv/run
	$(PY) bench/new_scans.py --modelpath $(DEMO)/models --cohort $(DEMO)/cohort

torture: .venv/run
	$(PY) bench/torture.py

sharing: .venv/run
	$(PY) bench/sharing.py

# Two tests at once, a thread each: on two cores that is faster than one test of two threads.
test: .venv/dev
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist worksteal

slurm-test: .venv/run
	$(PY) bench/slurm.py

fuzz: .venv/dev
	$(PY) -m pytest tests/test_fuzz.py --hypothesis-profile=long --hypothesis-show-statistics

lint: .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy *.py internals bench

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
