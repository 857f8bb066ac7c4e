# make demo: from a fresh clone to a trained model, its loss curve and its samples, in a few minutes on a laptop
# make test: the test suite        make slow: the long tests too        make lint: ruff

# an environment that is active is used; otherwise one is made in .venv
ifdef VIRTUAL_ENV
  PYTHON := python
else
  PYTHON := .venv/bin/python
endif
SYSTEM_PYTHON ?= python3
# stamps beside the environment say which requirements are installed in it
STAMPS := $(if $(VIRTUAL_ENV),$(VIRTUAL_ENV),.venv)

.PHONY: demo test slow lint

demo: $(STAMPS)/.acorn-requirements
	@test -f data/shakespeare/meta.json || $(PYTHON) prepare shakespeare
	$(PYTHON) train.py config/quickstart.py --overwrite=True
	$(PYTHON) sample.py --out_dir=out/quickstart --start="ROMEO:" --num_samples=2 --max_new_tokens=300
	@echo
	@echo "The loss curve is in out/quickstart/loss.png. To try next:"
	@echo "  $(PYTHON) sample.py --out_dir=out/quickstart --interactive=True"
	@echo "  $(PYTHON) prepare text YOUR_FILES --name mine --tokenizer char"
	@echo "  $(PYTHON) train.py config/quickstart.py --dataset=mine --out_dir=out/mine"
	@echo "  $(PYTHON) train.py --init_from=resume --out_dir=out/quickstart --max_iters=2000"

test: $(STAMPS)/.acorn-requirements-dev
	$(PYTHON) -m pytest

slow: $(STAMPS)/.acorn-requirements-dev
	$(PYTHON) -m pytest -m "slow or not slow"

lint: $(STAMPS)/.acorn-requirements-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .

$(STAMPS)/.acorn-requirements: requirements.txt
	@test -n "$(VIRTUAL_ENV)" || test -x $(PYTHON) || $(SYSTEM_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --disable-pip-version-check -q --progress-bar on -r requirements.txt
	@touch $@

$(STAMPS)/.acorn-requirements-dev: requirements-dev.txt $(STAMPS)/.acorn-requirements
	$(PYTHON) -m pip install --disable-pip-version-check -q -r requirements-dev.txt
	@touch $@
