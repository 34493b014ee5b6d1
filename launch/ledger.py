"""Check or compare runs: starts i3dist/programs/ledger.py."""

from i3dist.programs.ledger import start

if __name__ == "__main__":
    start()
