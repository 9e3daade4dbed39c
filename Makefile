# make demo        train a low-rank network and its dense twin on bundled data, and compare them
# make demo-cam    what dense and low-rank networks look at, on the photographs of test_images/
# make test        the whole test suite
# make lint        ruff, as CI runs it
# make docs        README and docs/ as a site with the API reference, in site/

PYTHON ?= python3
RUN := .venv/bin/python

.PHONY: demo demo-cam test lint docs clean

demo: .venv/ready
	rm -rf demo
	$(RUN) mnist/lenet5_mnist.py --dataset digits --epochs 20 --tau 0.2 --batch-size 32 --output-dir demo/results
	$(RUN) mnist/lenet5_mnist_baseline.py --dataset digits --epochs 20 --batch-size 32 --output-dir demo/results
	$(RUN) mnist/produce_results.py --results demo/results --output-dir demo

demo-cam: .venv/ready
	./run.sh

test: .venv/ready
	OMP_NUM_THREADS=1 $(RUN) -m pytest

lint: .venv/ready
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .

docs: .venv/ready
	$(RUN) -m pip install --quiet '.[docs]'
	$(RUN) -m mkdocs build --quiet --strict
	@echo "open site/index.html"

.venv/ready: requirements.txt pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "Python 3.10 or newer is needed, this is " + sys.version)'
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet -r requirements.txt
	touch $@

clean:
	rm -rf .venv demo site
