"""Preflight: whether the hosts of a job fit together, found out before step 0."""
