# make run    set up, then distill a student and test it on real images
# make test   set up, then run the tests
# make setup  .venv with the package, its extension and its extras
#   EXTRAS=slim      leaves out DALI, xFormers and ONNX
#   TORCH_INDEX=URL  package index of torch and torchvision
PYTHON ?= python3
EXTRAS ?= all
slim := distill,text,tensorboard
BIN := .venv/bin
STAMP := .venv/.ready
LOWEST := build/lowest
XFORMERS := build/xformers
LOWEST_TESTS := tests/test_dependencies.py tests/loss/test_kd_loss_api.py tests/config tests/data \
  tests/views/test_views.py tests/denoisers tests/classifiers tests/jobs/test_daily_use.py
NOT_OURS := --exclude 'libtorch*' --exclude 'libc10*'

# A copy in a folder, which has an extension of its own, built with the torch that is there.
copy_of_checkout = rm -rf $(1)/checkout && mkdir $(1)/checkout && \
  git ls-files -z | tar -c --null --files-from - | tar -x -C $(1)/checkout

.PHONY: run test test-long test-hard test-lowest test-xformers digits docs setup lint wheel clean

run: setup
	$(BIN)/dmkd distill configs/fashion_mnist.yaml

# Two processes of one thread each: every test file runs in one of them.
test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m "not slow and not hard"

test-long: setup
	$(BIN)/python -m pytest -m "not hard"

# Random cases by the thousand: claim, number of cases, failures.
test-hard: setup
	$(BIN)/python -m pytest -m hard tests/hard

# The lowest versions of all libraries, in build/lowest: 3 GB to fetch. The extension is built again.
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(call copy_of_checkout,$(LOWEST))
	$(LOWEST)/bin/python -m pip install --quiet -c constraints/lowest.txt \
	  torch "setuptools>=77" ninja
	cd $(LOWEST)/checkout && ../bin/python -m pip install --quiet -c constraints/lowest.txt \
	  --no-build-isolation -e ".[distill,text,tensorboard,onnx]" pytest hypothesis
	cd $(LOWEST)/checkout && ../bin/python -c "import torch, dmkd_fast._C"  # installs go on where it cannot be compiled
	cd $(LOWEST)/checkout && ../bin/python -m pytest -q -m "not slow and not hard" $(LOWEST_TESTS)

# The quick tests with xFormers and the torch that it is built for, which is the lowest one, too.
# In build/xformers: 4 GB to fetch. A copy of the checkout has an extension built with that torch.
test-xformers:
	test -x $(XFORMERS)/bin/python || $(PYTHON) -m venv $(XFORMERS)
	$(call copy_of_checkout,$(XFORMERS))
	$(XFORMERS)/bin/python -m pip install --quiet -c constraints/cuda-xformers.txt \
	  torch "setuptools>=77" ninja
	cd $(XFORMERS)/checkout && ../bin/python -m pip install --quiet \
	  -c constraints/cuda-xformers.txt --no-build-isolation \
	  -e ".[distill,text,tensorboard,onnx,xformers,dev]"
	$(XFORMERS)/bin/python -c "from xformers._cpp_lib import _built_with_cuda; assert _built_with_cuda"
	cd $(XFORMERS)/checkout && ../bin/python -c "import torch, dmkd_fast._C"  # installs go on where it cannot be compiled
	cd $(XFORMERS)/checkout && OMP_NUM_THREADS=1 ../bin/python -m pytest -n 2 --dist loadfile \
	  -m "not slow and not hard"

setup: $(STAMP)

# torch comes first: the extension is built against the torch that will load it.
$(STAMP): pyproject.toml setup.py $(wildcard csrc/*)
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet "setuptools>=77" ninja
	$(BIN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) \
	  "torch>=2.10" "torchvision>=0.25"
	$(BIN)/python -m pip install --quiet --no-build-isolation \
	  -e ".[$(if $(filter slim,$(EXTRAS)),$(slim),$(EXTRAS)),docs,dev]"
	touch $(STAMP)

# Hashes that stay equal as long as code only moves.
digits: setup
	$(BIN)/python -m benchmarks digits

# The documentation site, in site/; generated pages must be current and all links must resolve.
docs: setup
	$(BIN)/python scripts/reference.py --check
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/clang-format --dry-run --Werror csrc/*

# One wheel for Python 3.11 and newer, in dist/; torch brings its own libraries.
wheel: setup
	rm -rf build/wheel dist
	$(BIN)/python -m pip wheel --quiet --no-deps --no-build-isolation --wheel-dir build/wheel .
	PATH=$(abspath $(BIN)):$$PATH auditwheel repair $(NOT_OURS) --wheel-dir dist build/wheel/*.whl

clean:
	rm -rf .venv build dist site *.egg-info dmkd_fast/*.so
