"""Check a job's hosts: starts i3dist/programs/preflight.py, for launchers that start a file."""

from i3dist.programs.preflight import start

if __name__ == "__main__":
    start()
