# Every target makes .venv and installs what it needs; Python >= 3.11 and make are all that is assumed.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
OPS    := $(VENV)/.ops
WHEEL  := build/ops
# ON, OFF or AUTO: the CUDA operators too, where nvcc is (several minutes)
OPS_CUDA ?= AUTO
# one more than two cores: some tests wait, for other processes or for a signal
WORKERS ?= 3
DEMO   ?= lite_deformable/tiny
BENCH  ?= startup criterion

.PHONY: help install demo test test-long sanitize export-full lint docs bench clean
help:            ## what there is
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*##/\t/' | expand -t 12

install: $(READY) $(OPS)  ## .venv with detrcli, its test tools and, where a C++ compiler is, the native operators

$(READY): pyproject.toml
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "detrcli needs Python >= 3.11; name one: make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -e '.[dev,parity,onnx,openvino,eval,hf]'
	touch $@

$(OPS): $(READY) $(shell find detrcli_ops -name '*.cpp' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' -o -name '*.py' -o -name '*.txt' -o -name '*.toml')
	@if command -v c++ >/dev/null; then \
	  $(BIN)/python -m pip install --quiet scikit-build-core cmake ninja && \
	  rm -rf $(WHEEL) && \
	  $(BIN)/python -m pip wheel --quiet --no-build-isolation --no-deps -C cmake.define.DETRCLI_OPS_CUDA=$(OPS_CUDA) -w $(WHEEL) ./detrcli_ops && \
	  $(BIN)/python -m pip install --quiet --force-reinstall --no-deps $(WHEEL)/*.whl && \
	  if $(BIN)/python -m zipfile -l $(WHEEL)/*.whl | grep libdetrcli_ops_cuda >/dev/null; then echo "the native operators: CPU and CUDA"; \
	  else echo "the native operators: CPU only (OPS_CUDA=$(OPS_CUDA); CUDA needs nvcc and a torch with CUDA)"; fi; \
	else echo "no C++ compiler: the operators run in plain torch"; fi
	touch $@

demo: install    ## train, evaluate and predict on drawn pictures; a few minutes
	$(BIN)/detr train shapes --model $(DEMO) --epochs 8
	$(BIN)/detr eval shapes --model $(DEMO)
	@test -d runs/pictures || $(BIN)/detr --quiet data shapes runs/pictures --train 1 --val 12
	$(BIN)/detr predict runs/pictures/val --model $(DEMO)
	@echo
	@echo "The pictures with what was found are in the folder named last. Try next:"
	@echo "  . $(BIN)/activate"
	@echo "  detr predict PICTURE --model $(DEMO)      any picture of yours"
	@echo "  detr train FOLDER --model $(DEMO)         your own data, see docs/data.md"
	@echo "  detr profile --model $(DEMO) --by-part    what it costs"
	@echo "  detr zoo list                             what else there is"

test: install    ## everything that takes less than a minute
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --durations 25

test-long: install ## what takes longer: more families exported, ranks that hang and restart, many kills
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile -m long

sanitize: install ## the operators under AddressSanitizer and UBSan; many minutes
	$(BIN)/python -m pytest -m sanitizers tests/ops

export-full: install ## export and verify full-size models; many minutes
	$(BIN)/python -m pytest -m full_size tests/export

lint: $(READY)   ## style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy

docs: $(READY)   ## rewrite the generated pages: command reference, zoo table
	$(BIN)/python docs/generate.py

bench: install   ## measure, ratios within one run: make bench BENCH="ops models convergence" and all others in benchmarks/
	for name in $(BENCH); do $(BIN)/python benchmarks/$$name.py || exit; done

clean:           ## forget .venv and what was built
	rm -rf $(VENV) build dist *.egg-info detrcli_ops/build
