"""The training loop, how a run starts, and what watches over its steps."""
