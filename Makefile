# Every target sets up what it needs in .venv. PYTHON chooses the interpreter: make test PYTHON=python3.12
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

# The interpreter of `make test-oldest`, the oldest that pyproject.toml allows
PYTHON_OLDEST ?= python3.10
OLDEST := .venv-oldest

# How many processes the quickstart has: there is one for each GPU, and it has work for two.
GPUS = $(if $(shell command -v nvidia-smi),$(shell $(BIN)/python -c "import torch; print(torch.cuda.device_count())"))
PROCESSES ?= $(if $(filter 1,$(GPUS)),1,2)
LAUNCH = $(if $(filter 1,$(PROCESSES)),python,torchrun --standalone --nproc-per-node=$(PROCESSES))

# What `make bench` compares; birder's network too where birder is installed: make bench PEERS=birder/conv2former_t
PEERS ?=

# What is said before an installation, whose packages pip then names one by one.
announce = echo "Installing PyTorch, timm and the packages for training, export and tests into $(1): about 6 GB on" && \
	echo "Linux with PyTorch for CUDA, less elsewhere; minutes, most of them for the download. Only the first time."

.DEFAULT_GOAL := help
.PHONY: help quickstart test test-fast test-oldest test-gpu lint format bench bench-gpu growth clean

help: ## print this list
	@echo "make TARGET, where TARGET is one of:"
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  %-12s  %s\n", $$1, $$2 }' $(MAKEFILE_LIST)
	@echo "Each sets up what it needs in .venv first: the first time takes minutes, and about 6 GB with PyTorch for CUDA."

quickstart: $(READY) ## train on real digits with two processes, or on one GPU, then evaluate the result
	OMP_NUM_THREADS=1 $(BIN)/$(LAUNCH) scripts/train.py --config configs/quickstart.yaml
	$(BIN)/python scripts/validate.py --checkpoint runs/quickstart/checkpoints/best.pt

test: $(READY) ## run the tests, minutes on two cores
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-fast: $(READY) ## run the tests that take no training and no program of their own, while working on something
	$(BIN)/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder -m "not slow"

test-oldest: $(OLDEST)/.ready ## run the tests with the oldest Python and the oldest packages that pyproject.toml allows
	$(OLDEST)/bin/python -m pytest --numprocesses auto --maxprocesses 8 --dist loadfile --no-loadscope-reorder

test-gpu: $(READY) ## run the tests that need an NVIDIA GPU, minutes; the others hide it
	CONV2FORMER_TESTS_GPU=1 $(BIN)/python -m pytest tests/gpu -rs

lint: $(READY) ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(READY) ## mend what of the style can be mended by itself
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(READY) ## compare networks on this CPU, about five minutes on two cores, and write docs/benchmarks.md
	$(BIN)/python scripts/benchmark.py models conv2former_t conv2former_t:fused=false \
		convnext_tiny $(PEERS) conv2former_n convnext_nano \
		--train --inference --precision native --memory-format nchw channels_last --batch-size 8 --rounds 4 \
		--baseline convnext_tiny --markdown docs/benchmarks.md --chart docs/benchmarks.png

bench-gpu: $(READY) ## compare networks on an NVIDIA GPU, six minutes at most, and write docs/benchmarks-gpu.md
	$(BIN)/python scripts/benchmark.py models conv2former_t convnext_tiny conv2former_t:fused=false \
		swin_tiny_patch4_window7_224 $(PEERS) --device cuda --train --inference --precision bf16 \
		--memory-format channels_last --batch-size 128 1 --execution eager cudagraph compile --by-execution \
		--rounds 5 --minutes 4 --baseline convnext_tiny --markdown docs/benchmarks-gpu.md \
		--chart docs/benchmarks-gpu.png --json docs/benchmarks-gpu.json
	$(BIN)/python scripts/benchmark.py loop --config configs/imagenet1k/conv2former_t.yaml --rounds 10 --steps 10 \
		--markdown docs/benchmarks-gpu.md data.root=none data.img_size=224 train.batch_size=128 train.precision=bf16

growth: $(READY) ## measure time and memory from 224 to 1024 pixels, minutes, and write them to docs/benchmarks.md
	$(BIN)/python scripts/benchmark.py growth --markdown docs/benchmarks.md --chart docs/growth.png

clean: ## forget the environment and what the quickstart made
	rm -rf .venv $(OLDEST) runs/quickstart data/digits

$(READY): pyproject.toml
	@$(call announce,.venv)
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --disable-pip-version-check --editable ".[dev]"
	touch $(READY)

$(OLDEST)/.ready: pyproject.toml tests/oldest.txt
	@$(call announce,$(OLDEST))
	$(PYTHON_OLDEST) -m venv $(OLDEST)
	$(OLDEST)/bin/python -m pip install --disable-pip-version-check --constraint tests/oldest.txt --editable ".[test]"
	touch $@
