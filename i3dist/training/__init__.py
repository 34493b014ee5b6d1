"""The training loop, how a run starts, and what happens when its steps go wrong."""
