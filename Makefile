# One Makefile for everything; `make help` lists the targets.
VENV := .venv
PYTHON := $(VENV)/bin/python
RUN_STAMP := $(VENV)/.installed-run
DEV_STAMP := $(VENV)/.installed-dev
INSTALLED_FROM := pyproject.toml infra/constraints.txt infra/setup.sh

# What `make mesh MODEL=... STAGES=...` takes. The values reach the programs as
# PENSTOCK_<OPTION> in the environment, raw: neither make nor the shell expands what a prompt
# or a path contains.
OPTIONS := MODEL STAGES REPLICAS SPARES SLOW STAGE DTYPE DEVICE WIRE SPLIT KV_MEMORY PREFIX_CACHE SPECULATION GRPC_PORT METRICS_PORT DETACH \
	THREADS SHORTCUTS CERTS HOST CA KEYS KEY SEAL_KEYS MANIFEST REHASH_MINUTES \
	PROMPT MAX_TOKENS TEMPERATURE TOP_K TOP_P MIN_P SEED STOP RAW USAGE ADDRESS \
	MEMORY NAME STREAMS SECONDS REQUESTS JSON FORMATS WIRES WINDOWS QUESTIONS \
	ROUNDS PEERS CALLS ONE_CALL FAULTS KINDS COORDINATORS MINUTES EXECUTIONS NOW
unexport $(OPTIONS)
$(foreach option,$(OPTIONS),$(eval export PENSTOCK_$(option) = $$(value $(option))))

CLI := $(PYTHON) -m services.cli
# Processes that tests run in; 0: no others. Each compiles kernels, and starts whole meshes.
JOBS := 2

.DEFAULT_GOAL := help
.PHONY: help mesh generate status update repartition stop certs plan models pull test check format protos bench gpu bench-peers quality simulate chaos soak security fuzz-coverage clean

help: ## shows this list
	@echo "Penstock: make TARGET [OPTION=value ...]"
	@echo
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1~\2/p' $(MAKEFILE_LIST) | awk -F'~' '{ printf "%-16s %s\n", $$1, $$2 }'
	@echo
	@echo "The first run sets everything up in $(VENV). TORCH_INDEX=URL takes torch from a package"
	@echo "index of CPU builds, where the default one has a CUDA build of several GB."

mesh: $(RUN_STAMP) ## starts a local mesh: MODEL= STAGES=2 REPLICAS=1 SPARES=0 COORDINATORS=1 SLOW= DTYPE=auto DEVICE=cpu WIRE=f32 SPLIT=0:14,14:30 KV_MEMORY=2GiB PREFIX_CACHE=1 SPECULATION=16 KEYS=0 SEAL_KEYS= MANIFEST= REHASH_MINUTES=10 GRPC_PORT=8001 METRICS_PORT=8002 THREADS= SHORTCUTS=1 CERTS=auto DETACH=1
	@$(CLI) mesh

generate: $(RUN_STAMP) ## streams an answer of the running mesh: PROMPT="..." MAX_TOKENS= TEMPERATURE=0 TOP_K= TOP_P= MIN_P= SEED= STOP= RAW=1 USAGE=1 ADDRESS=host:port CA=path KEY=
	@$(CLI) generate $(if $(value STOP),--stop "$$PENSTOCK_STOP") -- "$$PENSTOCK_PROMPT"

status: $(RUN_STAMP) ## shows the running mesh: stages and their replicas, layers, health, memory, load
	@$(CLI) status

update: $(RUN_STAMP) ## gives a stage of the running mesh other weights: STAGE=1 MODEL= KEY=
	@$(CLI) update

repartition: $(RUN_STAMP) ## moves layers between stages of the running mesh: SPLIT=0:12,12:30 or STAGES=3, NOW=1 KEY=
	@$(CLI) repartition

stop: $(RUN_STAMP) ## ends the running mesh
	@$(CLI) stop

certs: $(RUN_STAMP) ## makes certificates for the parts of a mesh: CERTS=certs STAGES=2 HOST="names and addresses"
	@$(CLI) certs init

plan: $(RUN_STAMP) ## shows how a model would be cut, starts nothing: MODEL= STAGES= MEMORY=8GiB,8GiB SPLIT= SEAL_KEYS=
	@$(CLI) plan

models: $(RUN_STAMP) ## lists the models of the catalogue
	@$(CLI) models

pull: $(RUN_STAMP) ## fetches a model of the catalogue into the cache: NAME=
	@$(CLI) pull -- "$$PENSTOCK_NAME"

test: $(DEV_STAMP) ## runs all tests, two files at a time: JOBS=2 TESTS=tests/core runs some
	@$(PYTHON) -m pytest -n $(JOBS) --dist loadfile $(TESTS)

check: $(DEV_STAMP) ## lint, format, types, layers, protos
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports
	cd protos && ../$(VENV)/bin/buf lint
	$(PYTHON) protos/generate.py --check

format: $(DEV_STAMP) ## puts the code into its standard form
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

protos: $(DEV_STAMP) ## makes the stubs in protos/generated from the .proto files
	$(PYTHON) protos/generate.py

bench: $(DEV_STAMP) ## measures a mesh of its own: STREAMS="1 8 32 64 128 256" SECONDS=20 REQUESTS= ONE_CALL=1 JSON=path ADDRESS=host:port MODEL= STAGES= DTYPE= DEVICE= THREADS= KV_MEMORY= PREFIX_CACHE=1 CERTS=auto SHORTCUTS=1
	@$(PYTHON) -m tests.benchmarks

bench-peers: $(DEV_STAMP) ## compares with others on this machine: ROUNDS=3 STREAMS="1 8 32 64 128 256" PEERS="vllm llamacpp" FORMATS="int8 bf16" CALLS="many each" SECONDS=60 JSON=path
	@$(PYTHON) -m tests.benchmarks.peers

gpu: $(DEV_STAMP) ## tests and measures the CUDA engine on this machine's GPU: JSON=path
	@$(PYTHON) -m tests.benchmarks.gpu

quality: $(DEV_STAMP) ## measures what number formats cost: FORMATS="bf16 fp32 int8 int4" STAGES=1 WIRES="f32 bf16 int8" WINDOWS=32 QUESTIONS=1000 JSON=path MODEL=
	@$(PYTHON) -m tests.benchmarks.quality

simulate: $(DEV_STAMP) ## prints how busy the scheduler keeps simulated pipelines of 2 to 64 stages
	@$(PYTHON) -m tests.benchmarks.simulated

chaos: $(DEV_STAMP) ## makes parts of a mesh fail, one at a time, and compares every answer: FAULTS=200 SEED=1 KINDS="killed" STREAMS=32 REPLICAS= SPARES= COORDINATORS= MODEL= DTYPE= DEVICE=cpu
	@$(PYTHON) -m tests.chaos
	@$(PYTHON) -m tests.chaos.overload

soak: $(DEV_STAMP) ## all kinds of clients for a long time, while parts die: MINUTES=30 SEED=1
	@$(PYTHON) -m tests.chaos.soak

security: $(DEV_STAMP) ## tries for long to break what SECURITY.md promises: EXECUTIONS=20000 SEED=1 JSON=path
	@$(PYTHON) -m tests.security

fuzz-coverage: $(DEV_STAMP) ## shows how much of the files that read bytes from outside the fuzzers reach: EXECUTIONS=2000
	@$(PYTHON) -m coverage erase
	@$(PYTHON) -m coverage run -m tests.fuzz --executions "$${PENSTOCK_EXECUTIONS:-2000}"
	@$(PYTHON) -m coverage run -m tests.fuzz.rpc --executions "$${PENSTOCK_EXECUTIONS:-2000}"
	@$(PYTHON) -m coverage combine --quiet
	@$(PYTHON) -m coverage report

clean: ## removes the virtual environment and the tools' caches; models stay
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache .coverage* build dist

$(RUN_STAMP): $(INSTALLED_FROM)
	@VENV=$(VENV) infra/setup.sh run
	@$(CLI) warm
	@touch $@

$(DEV_STAMP): $(INSTALLED_FROM)
	@VENV=$(VENV) infra/setup.sh dev
	@$(CLI) warm
	@touch $(RUN_STAMP) $@
