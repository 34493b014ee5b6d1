"""Evaluate a model: starts i3dist/programs/evaluate.py."""

from i3dist.programs.evaluate import start

if __name__ == "__main__":
    start()
