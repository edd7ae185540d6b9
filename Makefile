# On a fresh machine with Python 3.11 or newer: `make demo`, `make test`. The environment is made once, in .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test check docs linkcheck format clean

# moto is the S3 server of the tests. Its boto3 must be of the same version as the botocore that s3fs needs; in one step, pip
# would try one version of boto3 after the other for minutes.
# torch and torchvision are installed plainly and together: a CPU-only torch cannot load the registry's torchvision
$(VENV)/.installed: pyproject.toml setup.py fkd_ssl/crops/_avx2.c
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed; pass PYTHON=python3.12, say" if sys.version_info < (3, 11) else 0)'
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	rm -f fkd_ssl/crops/*.so
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	$(BIN)/python -m pip install --quiet s3fs && $(BIN)/python -m pip install --quiet 'moto[s3]>=5' flask flask-cors \
		"boto3==$$($(BIN)/python -c 'import botocore; print(botocore.__version__)')" || echo "no S3 server: its tests will be skipped"
	@touch $@

demo: $(VENV)/.installed
	$(BIN)/fkd-ssl demo --out runs/demo

test: $(VENV)/.installed
	TQDM_DISABLE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

# lint, types and doctests on the built wheel in an environment of its own, where nothing of this folder is importable
check: $(VENV)/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build dist
	$(BIN)/python -m build --wheel --outdir dist . >/dev/null
	$(BIN)/python tests/check_wheel.py dist
	$(MAKE) docs

# the site, in build/site/index.html; a warning is an error: a link or an anchor that is not there, a page in no table of contents
docs: $(VENV)/.installed
	$(BIN)/python -m sphinx -E -W --keep-going -q -b html docs build/site

# the addresses of other sites; needs a network, so it is no part of check
linkcheck: $(VENV)/.installed
	$(BIN)/python -m sphinx -E -q -b linkcheck docs build/linkcheck

format: $(VENV)/.installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) build dist fkd_ssl/crops/*.so *.egg-info .mypy_cache .pytest_cache .ruff_cache
