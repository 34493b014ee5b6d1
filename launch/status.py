"""Say how a run fares: starts i3dist/programs/status.py."""

from i3dist.programs.status import start

if __name__ == "__main__":
    start()
