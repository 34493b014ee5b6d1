"""Export a model to transformers: starts i3dist/programs/export.py."""

from i3dist.programs.export import start

if __name__ == "__main__":
    start()
