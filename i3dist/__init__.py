"""i3dist: distributed training of language models whose past is compressed."""

__version__ = "0.1.0"
