"""Operators: each fast form stands beside the naive twin that is its oracle."""
