"""`python -m acorn.inspect`: see acorn/inference/pictures.py."""

from acorn import run
from acorn.inference import pictures

if __name__ == "__main__":
    run(pictures.main)
