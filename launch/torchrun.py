"""Start ranks with torchrun, on one host or several: starts i3dist/programs/torchrun.py."""

from i3dist.programs.torchrun import start

if __name__ == "__main__":
    start()
