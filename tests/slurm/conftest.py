import os
from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Cluster, missing, running_cluster


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """A running two-node Slurm cluster; where it must exist (CI), its absence is a failure."""
    reason = missing()
    if reason and (os.environ.get("CI") or os.environ.get("I3DIST_REQUIRE_SLURM") == "1"):
        pytest.fail(f"no Slurm cluster for the tests: {reason}")
    if reason:
        pytest.skip(reason)
    with running_cluster() as running:
        yield running
