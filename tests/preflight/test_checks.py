"""What the facts of all ranks say: the odd host is named, whatever it differs in, and no other."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.errors import UserError
from i3dist.preflight.checks import examine
from i3dist.preflight.facts import Facts, Given
from i3dist.preflight.findings import Finding
from i3dist.preflight.gpu import GpuFacts
from i3dist.preflight.measure import ROUNDS, partners
from i3dist.preflight.run import refuse

GPU = GpuFacts("NVIDIA H200", 2**37, 8, 8, driver="570.1", product=5, flops=7e14)
GIVEN = Given(
    folder=Path("runs/a"),
    settings={"train.steps": "5", "train.seed": "0"},
    engine_file=Path("zero2.json"),
    engine="{}",
    data="d" * 64,
    step=100,
    checkpoint_bytes=4e9,
)


def job(sizes: list[int], gpu: bool = True) -> list[Facts]:
    """Ranks of sound hosts; each number is one host's ranks."""
    places = [(host, index) for host, size in enumerate(sizes) for index in range(size)]
    return [
        Facts(
            rank=rank,
            host=f"node{host}",
            pid=100 + index,  # the same on all hosts, as in containers
            given=GIVEN,
            sources="c" * 64,
            commit="1" * 40,
            versions={"torch": "2.11", "numpy": "2.3"},
            token="word",
            free=10**12,
            clock=1e9,
            gpu=replace(GPU, index=index, users=(100, 101, 102, 103)[:size]) if gpu else None,
            rate=4e10,
        )
        for rank, (host, index) in enumerate(places)
        for size in [sizes[host]]
    ]


def its(**values: Any) -> Callable[[Facts], Facts]:
    return lambda facts: replace(facts, **values)


def of_given(**values: Any) -> Callable[[Facts], Facts]:
    return lambda facts: replace(facts, given=replace(facts.given, **values))


def of_gpu(**values: Any) -> Callable[[Facts], Facts]:
    return lambda facts: replace(facts, gpu=replace(facts.gpu, **values))  # type: ignore[type-var]


# The check that finds each difference of a host, and a part of its line.
DIFFERENCES = {
    "input": (of_given(fault="no such data; make it"), "no such data; make it"),
    "code": (its(sources="x" * 64), "other code .commit 1111111111, files xxxxxxxx"),
    "packages": (its(versions={"torch": "2.12", "numpy": "2.3"}), r"torch 2.12 .node\d: 2.11.;"),
    "a package lacks": (its(versions={"torch": "2.11"}), "numpy None"),
    "settings": (of_given(settings={"train.steps": "5", "train.seed": "9"}), r"train.seed 9 .node"),
    "engine file": (of_given(engine="{1}"), "another engine file"),
    "data": (of_given(data="e" * 64), "fingerprint eeeeeeeeee"),
    "run.path": (its(token=None), "run.path=runs/a is not the folder"),
    "run.path, to read only": (its(unwritable="Read-only file system"), "cannot be written: Read"),
    "run.path, another": (its(token="other"), "is not the folder"),
    "run.path, late": (of_given(step=50), "the run at step 50, node"),
    "disk": (its(free=79 * 10**8), "7.9 GB free .* two take 8.0 GB"),
    "GPUs unseen": (of_gpu(seen=7), "has 8 GPUs, and torch sees 7"),
    "GPUs of another kind": (of_gpu(name="NVIDIA H100"), "NVIDIA H100 of 128 GiB, unlike node"),
    "GPUs: none": (its(gpu=None), "a CPU, unlike"),
    "GPUs used": (of_gpu(users=(100, 101, 102, 103, 999)), r"pid (\d+, )*999"),
    "GPU health": (of_gpu(faults=("3 uncorrected memory errors",)), "3 uncorrected"),
    "GPU health, product": (of_gpu(product=6), "a matrix product differs"),
    "GPU health, speed": (of_gpu(flops=4e14), "400 TFLOP/s, the others 700"),
    "clocks": (its(clock=1e9 - 7), "7 s behind"),
    "network": (its(rate=1e10), "10.0 GB/s with other hosts, which reach 40.0"),
}


def findings(everyone: list[Facts]) -> dict[str, list[Finding]]:
    return {o.name: o.findings for o in examine(everyone) if o.findings}


@pytest.mark.parametrize("kind", DIFFERENCES)
@settings(max_examples=20)
@given(data=st.data())
def test_the_host_that_differs_is_named_and_no_other(kind: str, data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 4))
    # All hosts as large, so that most ranks are those of the others; and so many that most differ.
    everyone = job([ranks] * data.draw(st.integers(3, 6)))
    odd = data.draw(st.sampled_from(everyone)).host
    change, says = DIFFERENCES[kind]
    if kind.startswith("run.path") and odd == "node0":
        return  # rank 0's folder is the run's
    changed = [change(facts) if facts.host == odd else facts for facts in everyone]
    found = findings(changed)
    name = max((o.name for o in examine(everyone) if kind.startswith(o.name)), default="", key=len)
    assert not name or name in found, found
    lines = [finding for some in found.values() for finding in some]
    if kind != "GPUs: none":  # whose fault is whose
        assert {finding.where.split(" (")[0] for finding in lines} == {odd}
    assert any(re.search(says, str(finding)) for finding in lines), lines
    with pytest.raises(UserError, match=odd):
        refuse(examine(changed))


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=6), gpu=st.booleans())
def test_hosts_that_fit_are_not_refused(sizes: list[int], gpu: bool) -> None:
    everyone = job(sizes, gpu)
    assert findings(everyone) == {}
    refuse(examine(everyone))


def test_one_rank_of_a_host_is_named_with_its_number() -> None:
    everyone = job([2, 2])
    everyone[3] = its(sources="x" * 64)(everyone[3])
    assert findings(everyone)["code"][0].where == "node1 (rank 3)"


def test_many_findings_are_counted_in_one_line() -> None:
    """How to start all the same is said where that helps: wrong input ends any run."""
    everyone = [its(sources=str(facts.rank) * 64)(facts) for facts in job([1] * 9)]
    with pytest.raises(
        UserError, match=r"\(and 7 more, above\); --no-preflight starts all the same$"
    ):
        refuse(examine(everyone))
    everyone[4] = of_given(fault="broken")(everyone[4])
    with pytest.raises(UserError) as error:
        refuse(examine(everyone))
    assert str(error.value) == "preflight: node4: broken; correct it there (and 8 more, above)"
    with pytest.raises(UserError, match=r"cannot be written: Read-only file system; .* run\.path$"):
        refuse(examine([its(unwritable="Read-only file system")(job([1])[0])]))


def test_the_same_fault_of_many_hosts_is_one_finding() -> None:
    everyone = [of_given(fault="no data; make it")(facts) for facts in job([2] * 7)]
    assert [str(f) for f in findings(everyone)["input"]] == ["every host: no data; make it"]
    everyone[0] = job([2])[0]
    (finding,) = findings(everyone)["input"]
    assert finding.where == "node0 (rank 1), node1, node2, node3, 3 more"


def test_a_driver_of_another_version_is_only_a_warning() -> None:
    everyone = [*job([1]), *(of_gpu(driver="580")(f) for f in job([1, 1])[1:])]
    assert [finding.refuses for finding in findings(everyone)["GPUs"]] == [False]
    refuse(examine(everyone))


def test_a_run_that_continues_needs_room_for_what_is_not_there_yet() -> None:
    change = of_given(checkpoint_bytes=4e9, checkpoints_to_come=1)
    assert findings([its(free=41 * 10**8)(change(facts)) for facts in job([1, 1])]) == {}
    (finding,) = findings([its(free=39 * 10**8)(change(f)) for f in job([1, 1])])["disk"]
    assert "one checkpoint takes 4.0 GB" in finding.what


def test_who_uses_a_gpu_is_not_said_where_the_driver_counts_processes_otherwise() -> None:
    assert findings([of_gpu(users=(9,))(facts) for facts in job([2, 2])]) == {}


@given(sizes=st.lists(st.integers(1, 4), min_size=1, max_size=9))
def test_each_round_pairs_ranks_of_different_hosts(sizes: list[int]) -> None:
    hosts = [f"node{host}" for host, size in enumerate(sizes) for _ in range(size)]
    rounds = list(zip(*(partners(rank, hosts) for rank in range(len(hosts))), strict=True))
    count = len(sizes)
    assert len(rounds) == (0 if count == 1 else min(ROUNDS, count - 1 + count % 2))
    met = set()
    for pairs in rounds:
        for rank, partner in enumerate(pairs):
            if partner is not None:
                assert pairs[partner] == rank and hosts[rank] != hosts[partner]
                assert (rank, partner) not in met
                met.add((rank, partner))
        idle = {hosts[rank] for rank, partner in enumerate(pairs) if partner is None}
        if len(set(sizes)) == 1:
            assert len(idle) == count % 2
