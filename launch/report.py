"""Report on runs: starts i3dist/programs/report.py."""

from i3dist.programs.report import start

if __name__ == "__main__":
    start()
