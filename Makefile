# make demo       train a small ViT on handwritten digits and draw its curves, classify three photographs and draw
#                 attention maps: with the installation three minutes on two CPU cores
# make test       the tests of models, loop, resumption, data and errors, five minutes on two CPU cores
# make test-all   all tests: also whole paths through the shell, many processes, compilation, benchmarks
# make lint       ruff's checks and format
# make format     fix what ruff can fix
# Each of them creates a virtual environment in .venv if there is none. PYTHON selects the Python that creates it.

PYTHON ?= python3
BIN := .venv/bin

DEMO := train.py --name demo --overwrite --dataset digits --model_type ViT-Mini_4 --img_size 16 \
	--min_crop_scale 0.6 --train_batch_size 64 --num_steps 450 --warmup_steps 40 \
	--optimizer muon --learning_rate 4e-3 --weight_decay 0.5 --eval_every 50
SHIPPED := checkpoint/R26-ViT-Mini_4-cifar10.npz
PICTURES := img/cifar10/bird-2.jpg img/cifar10/deer-1.jpg img/cifar10/truck-1.jpg

.PHONY: demo test test-all lint format

demo: .venv/installed
	$(BIN)/python $(DEMO)
	$(BIN)/python evaluate.py --checkpoint $(SHIPPED) $(PICTURES)
	$(BIN)/python visualize.py --checkpoint $(SHIPPED) --image $(PICTURES) --rollout --output_dir output/demo/pictures
	@echo output/demo/curves.png

test: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses auto -m "not slow"

test-all: .venv/installed-dev
	$(BIN)/python -m pytest --numprocesses auto

lint: .venv/installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: .venv/installed-dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "error: $(PYTHON) is not Python 3.11 or newer; try make PYTHON=python3.12" >&2; exit 2; }
	@rm -rf .venv
	@$(PYTHON) -m venv .venv || { rm -rf .venv; \
		echo "error: $(PYTHON) has no venv module; on Debian and Ubuntu: apt install python3-venv" >&2; exit 2; }

# The stamps record which requirements are installed; a newer requirements file is installed again.
.venv/installed: requirements.txt .venv/bin/python
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-dev.txt
	@touch $@
