"""Checks an output of shard.py: what verify.py does."""
