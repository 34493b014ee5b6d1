"""Offline data preparation: text in, sharded token chunks out. Needs no torch."""
