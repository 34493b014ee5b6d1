"""Train a model: starts i3dist/programs/train.py, for launchers that start a file."""

from i3dist.programs.train import start

if __name__ == "__main__":
    start()
