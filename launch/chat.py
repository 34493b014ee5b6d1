"""Talk with a model: starts i3dist/programs/chat.py."""

from i3dist.programs.chat import start

if __name__ == "__main__":
    start()
