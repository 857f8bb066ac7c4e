# make demo: train a model on a fresh clone, plot its loss curve and sample from it, in a few minutes on a laptop
# make demo-zh: the same with Tang and Song poems (needs npm), with hints in Chinese
# make test: the test suite        make slow: include the long tests        make lint: ruff and mypy
# make gpu: on a CUDA machine, the tests marked gpu and the benchmarks at GPU sizes, in under nine minutes

# an active environment is used; otherwise one is created in .venv
ACTIVE := $(or $(VIRTUAL_ENV),$(CONDA_PREFIX))
PYTHON := $(if $(ACTIVE),python,.venv/bin/python)
SYSTEM_PYTHON ?= python3
# stamp files inside the environment record which requirements are installed
STAMPS := $(or $(ACTIVE),.venv)

.PHONY: demo demo-zh test slow lint gpu

demo: $(STAMPS)/.acorn-requirements
	@test -f data/plays/meta.json || $(PYTHON) prepare shakespeare
	$(PYTHON) train.py config/quickstart.py --max_iters=800 --eval_interval=100 --sample_interval=200 --overwrite=True
	$(PYTHON) sample.py --out_dir=out/quickstart --start="ROMEO:" --num_samples=2 --max_new_tokens=300
	@echo
	@echo "The loss curve is in out/quickstart/loss.png. What to try next:"
	@echo "  $(PYTHON) sample.py --out_dir=out/quickstart --interactive=True   # type a beginning, such as ROMEO:"
	@echo "  $(PYTHON) -m acorn.serve --out_dir=out/quickstart                 # the same on a page in the browser"
	@echo "  $(PYTHON) train.py config/quickstart.py --init_from=out/quickstart --out_dir=out/longer --max_iters=5000   # train longer"
	@echo "  $(PYTHON) prepare text YOUR_FILES --name mine --tokenizer char    # use your own text"
	@echo "  $(PYTHON) train.py config/quickstart.py --dataset=mine --out_dir=out/mine"
	@echo "README.md explains the commands, docs/training.md the figures that a run prints."

demo-zh: $(STAMPS)/.acorn-requirements
	@test -f data/poems/meta.json || $(PYTHON) prepare poems
	$(PYTHON) train.py config/poems.py --overwrite=True
	$(PYTHON) sample.py --out_dir=out/poems --start="《春晓》" --num_samples=3 --max_new_tokens=100 --temperature=0.8 --stop="《"
	@echo
	@echo "损失曲线在 out/poems/loss.png。接下来可以试试："
	@echo "  $(PYTHON) sample.py --out_dir=out/poems --interactive=True        # 输入标题或第一句，例如 《山中》王维"
	@echo "  $(PYTHON) -m acorn.serve --out_dir=out/poems                      # 在浏览器的网页中续写"
	@echo "  $(PYTHON) train.py config/poems.py --init_from=out/poems --out_dir=out/longer --max_iters=8000   # 训练更久"
	@echo "  $(PYTHON) prepare text 你的文件 --name mine --tokenizer char        # 换成自己的文本"
	@echo "  $(PYTHON) train.py config/quickstart.py --dataset=mine --out_dir=out/mine"
	@echo "教程：docs/tutorial.zh-CN.md"

test: $(STAMPS)/.acorn-requirements-dev
	$(PYTHON) -m pytest -n 2 --dist worksteal

slow: $(STAMPS)/.acorn-requirements-dev
	$(PYTHON) -m pytest -n 2 -m "not gpu"

lint: $(STAMPS)/.acorn-requirements-dev
	$(PYTHON) -m ruff check .
	$(PYTHON) -m ruff format --check .
	$(PYTHON) -m mypy

# installs nothing, and uses the torch that is already installed
gpu:
	$(or $(and $(ACTIVE),python),$(wildcard .venv/bin/python),$(SYSTEM_PYTHON)) benchmarks/gpu.py

# --no-compile halves the installation: Python compiles a module when it is first imported, and most never are
$(STAMPS)/.acorn-requirements: requirements.txt
	@test -n "$(ACTIVE)" || test -x $(PYTHON) || $(SYSTEM_PYTHON) -m venv .venv
	$(PYTHON) -m pip install --disable-pip-version-check --no-compile -q --progress-bar on -r requirements.txt
	@touch $@

$(STAMPS)/.acorn-requirements-dev: requirements-dev.txt $(STAMPS)/.acorn-requirements
	$(PYTHON) -m pip install --disable-pip-version-check --no-compile -q -r requirements-dev.txt
	@touch $@
