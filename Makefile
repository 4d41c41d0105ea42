# Short names for start.py, which works the same where there is no make (Windows: py start.py test).
# Arguments go through ARGS:  make reproduce ARGS="--scale smoke"
PYTHON ?= python3
ARGS ?=

.PHONY: help reproduce test test-full lab student grade site slides install clean

help:
	@echo "make reproduce   the main job: the two figures and their report, in outputs/"
	@echo "make test        unit tests, and the notebooks at their smallest scale"
	@echo "make test-full   the notebooks as a student runs them, marked outputs compared"
	@echo "make lab         JupyterLab on notebooks/"
	@echo "make student     for instructors: the notebooks without solutions, in dist/"
	@echo "make grade ARGS=submissions   for instructors: grade that folder (INSTRUCTORS.md)"
	@echo "make site        the course as a static site, in build/site/"
	@echo "make slides      a deck of slides for each notebook, in build/slides/"
	@echo "make install     the environment alone, in .venv"
	@echo "make clean       remove .venv and caches; outputs/ stays"

reproduce test test-full lab student grade site slides install:
	@$(PYTHON) start.py $@ $(ARGS)

clean:
	rm -rf .venv build *.egg-info .pytest_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
