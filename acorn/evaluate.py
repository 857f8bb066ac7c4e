"""`python -m acorn.evaluate`: see acorn/evaluation/tasks.py."""

from acorn import run
from acorn.evaluation import tasks

if __name__ == "__main__":
    run(tasks.main)
