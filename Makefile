# make demo      install into .venv, then generate data, train and predict in demo/
# make test      install into .venv, then lint and test; takes minutes
# make test-all  also run the slow tests
# make check     only lint and check types
# make gpu       tests that need an NVIDIA GPU, then speed and memory in benchmarks/GPU.md; 9 minutes at most
# make campaign  stress tests with thousands of kills, races and damaged inputs; takes hours
# make report    train the missing runs of experiments/ (all of them: 5 hours on two cores), write report.pdf and
#                RESULTS.md
# make study     tune and sweep the rows of experiments/; takes hours, and goes on where it was stopped
# make provided  like make report, then rewrite checkpoints/provided/
#
# PIP_ARGS is passed to pip; see README.md for the CPU build of torch. `make gpu PY=python3` installs nothing and uses
# what that Python has.

PYTHON ?= python3
VENV := .venv
PY := $(VENV)/bin/python
DEMO := demo
# two test processes with one thread each: more threads would slow each other down on a small machine
TEST := OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest -n 2

.PHONY: demo test test-all check gpu campaign report study provided clean

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(None if v >= (3, 11) else "error: vidtune needs Python 3.11 or newer, this is %d.%d" % v)'
	$(PYTHON) -m venv $(VENV)

$(VENV)/installed: requirements.txt $(VENV)/bin/python
	$(PY) -m pip install -q $(PIP_ARGS) -r requirements.txt
	@touch $@

$(VENV)/installed-dev: requirements-dev.txt requirements-extra.txt $(VENV)/installed
	$(PY) -m pip install -q $(PIP_ARGS) -r requirements-dev.txt
	@touch $@

$(VENV)/installed-extra: requirements-extra.txt $(VENV)/installed
	$(PY) -m pip install -q $(PIP_ARGS) -r requirements-extra.txt
	@touch $@

demo: $(VENV)/installed
	@set -e; start=$$(date +%s); rm -f $(DEMO)/predictions.jsonl; \
	$(PY) dummy_data.py --output $(DEMO)/synthetic_dataset --classes 4 --videos_per_class 96 --val_per_class 12 --test_per_class 20 --overwrite; \
	train="$(PY) main.py --data_dir $(DEMO)/synthetic_dataset --output_dir $(DEMO)/checkpoints --overwrite True --use_vlm True \
	--language_model bert --freeze_visionbackbone True --freeze_llmbackbone True"; \
	$$train --run_name without_text; $$train --run_name with_text --use_text True --controls True; \
	$(PY) create_dummy.py --data_dir $(DEMO)/synthetic_dataset --output $(DEMO)/frames_see; \
	$(PY) inference.py --checkpoint $(DEMO)/checkpoints/with_text --video_dir $(DEMO)/frames_see --output $(DEMO)/predictions.jsonl; \
	echo "Data, runs (see the pictures there) and predictions are in $(DEMO)/. Next: your own clips, see README.md."; \
	seconds=$$(($$(date +%s) - start)) $(PY) -c "$$DEMO_RESULT"

# the last line of the demo: accuracy without a text, with it, and with the text of the wrong object
define DEMO_RESULT
import json, os
runs = "$(DEMO)/checkpoints"
without, with_text = (json.load(open(f"{runs}/{run}/metrics.json")) for run in ("without_text", "with_text"))
wrong = with_text["controls"]["text_other_object"]
shares = [f"{100 * m['accuracy']:.0f} %" for m in (without["test"], with_text["test"], wrong)]
print(f"accuracy on {without['test']['count']} test videos: {shares[0]} without text, {shares[1]} with text;",
    f"on {wrong['count']} with two objects, with the text of the other one: {shares[2]} ({os.environ['seconds']} s)")
endef
export DEMO_RESULT

test: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(TEST)

test-all: $(VENV)/installed-dev
	$(PY) -m ruff check .
	VIDTUNE_EXAMPLES=1000 $(TEST) -m "slow or not slow"

check: $(VENV)/installed-dev
	$(PY) -m ruff check .
	$(PY) -m ty check .

# the benchmark keeps to 6 minutes by itself
gpu: $(if $(filter $(VENV)/%,$(PY)),$(VENV)/installed-dev)
	@export HF_HUB_OFFLINE=1; status=0; \
	VIDTUNE_TEST_GPU=1 OMP_NUM_THREADS=1 timeout 150 $(PY) -m pytest -n auto --maxprocesses 8 tests/test_gpu.py || status=$$?; \
	$(PY) -m benchmarks.gpu || status=$$?; exit $$status

campaign: $(VENV)/installed-dev
	@status=0; for name in kills races media texts checkpoints; do \
	echo "== $$name"; nice -n 19 $(PY) -m tests.campaign.$$name || status=1; done; exit $$status

report: $(VENV)/installed-extra
	$(PY) -m experiments.make_report --pack

study: $(VENV)/installed-extra
	$(PY) -m experiments.make_study

provided: $(VENV)/installed-extra
	$(PY) -m experiments.make_report --provide

clean:
	rm -rf $(VENV) $(DEMO)
