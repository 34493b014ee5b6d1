"""Continue a text: starts i3dist/programs/generate.py."""

from i3dist.programs.generate import start

if __name__ == "__main__":
    start()
