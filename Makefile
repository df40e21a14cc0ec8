# Everything a fresh machine needs: `make demo` and `make test` make their own virtual environment.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-all check clean

# The CPU build of torch is asked for by exact version first: an unpinned torch pulls gigabytes of CUDA libraries.
.venv/installed: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -q --upgrade pip
	$(BIN)/python -m pip install -q "torch==2.13.0"
	$(BIN)/python -m pip install -q -e ".[dev]"
	touch $@

demo: .venv/installed
	$(BIN)/autotune tune examples/demo_model --out runs/demo --max-loss 0.2% --workload decode --trials 6 --set finalists=3 --set score_tokens=8192 --set certify_tokens=150000
	@echo "report: runs/demo/report.html"

# Two processes, a file of tests never in both: most wait for a single thread, and a file's fixtures are made once.
test: .venv/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not gpu"

test-all: .venv/installed
	$(BIN)/python -m pytest

check: .venv/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

clean:
	rm -rf runs build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache
