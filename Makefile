# Everything runs in .venv, made from constraints.txt. `make demo` and `make test` are each complete in themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := demo

DEMO_FLAGS := --config recipes/demo_cpu.yaml --train_data_path $(DEMO)/data/train.bin \
	--val_data_path $(DEMO)/data/val.bin --checkpoint_path $(DEMO)/checkpoint

.PHONY: demo builds test slow faults integration lint format docs clean

$(VENV)/installed: setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $@

# An environment of its own: constraints-integration.txt says why.
$(VENV)-integration/installed: setup.cfg pyproject.toml constraints.txt constraints-integration.txt
	$(PYTHON) -m venv $(VENV)-integration
	$(VENV)-integration/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
		--constraint constraints-integration.txt --editable '.[integration]'
	@touch $@

demo: $(VENV)/installed
	$(BIN)/python -m train.preprocess_data --dataset stdlib --out_dir $(DEMO)/data --val_fraction 0.003 --overwrite
	$(BIN)/python -m train --run_type baseline $(DEMO_FLAGS)
	$(BIN)/accelerate launch --config_file accelerate_configs/deepspeed.yaml -m train --run_type optimized \
		--deepspeed_config ds_configs/zero2.json --pipeline_stages 1 --loss_chunk_size 256 $(DEMO_FLAGS)
	$(BIN)/python -m train.compare $(DEMO)/checkpoint/baseline $(DEMO)/checkpoint/optimized --out $(DEMO)/report
	$(BIN)/python -m train.generate --checkpoint $(DEMO)/checkpoint/optimized --prompt "    def __init__(self" \
		--max_new_tokens 200 --temperature 1 --top_k 50

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(VENV)/installed
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

builds: $(VENV)/installed
	$(BIN)/python -m tests.torch_builds

test: $(VENV)/installed
	$(MAKE) --jobs 2 lint builds
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "slow and not gpu" --ignore tests/test_demo.py
	$(BIN)/python -m pytest -m slow tests/test_demo.py # alone, for it measures

faults: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --no-loadscope-reorder -m "faults and not gpu"

integration: $(VENV)-integration/installed
	$(VENV)-integration/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m integration

docs: $(VENV)/installed
	$(BIN)/python docs/reference.py > docs/reference.md

clean:
	rm -rf $(DEMO) build dist *.egg-info
