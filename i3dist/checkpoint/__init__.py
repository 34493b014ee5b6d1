"""Checkpoints that a run continues from, and the final weights."""
