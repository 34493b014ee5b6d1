"""What all ranks' facts say about the job. Pure: every rank gets the same facts and answers alike.

A check of your own is a `Check` in `CHECKS`.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from statistics import median, median_high
from typing import NamedTuple

from i3dist.preflight.facts import Facts
from i3dist.preflight.findings import Everyone, Finding, groups, hosts, listed, unlike, where
from i3dist.preflight.gpu import GpuFacts

CLOCK_SECONDS = 5.0  # that clocks may be apart
SLOW_LINK, SLOW_GPU = 0.5, 0.7  # shares of the others' speed below which one is refused
GB = 1e9


class Check(NamedTuple):
    """One thing to check."""

    name: str
    shown: Callable[[Everyone], str]
    """What was found, for the table."""
    judge: Callable[[Everyone], Iterator[Finding]]


class Outcome(NamedTuple):
    """What came of a check."""

    name: str
    shown: str
    findings: list[Finding]


def examine(everyone: Everyone) -> list[Outcome]:
    """The outcome of every check, in the table's order."""
    return [
        Outcome(check.name, check.shown(everyone), list(check.judge(everyone))) for check in CHECKS
    ]


def _sound(everyone: Everyone) -> list[Facts]:
    """The ranks whose input is sound; of the others data and checkpoint may be unknown."""
    return [facts for facts in everyone if facts.given.fault is None]


def judge_input(everyone: Everyone) -> Iterator[Finding]:
    """What ranks found wrong with their command line, data or checkpoint."""
    for group in groups(everyone, lambda facts: facts.given.fault):
        fault = group[0].given.fault
        if fault is not None:
            what, _, remedy = fault.partition("; ")
            remedy = remedy or "correct it there"
            yield Finding(where(group, everyone), what, remedy, ends_anyway=True)


def judge_code(everyone: Everyone) -> Iterator[Finding]:
    """Equal source files. Commits that differ in other files only are no finding."""
    return unlike(
        everyone,
        everyone,
        lambda facts: facts.sources,
        lambda one, usual: f"other code ({_code(one)}) than {usual.host} ({_code(usual)})",
        "bring all hosts to one commit, or start from a folder that they share",
    )


def _code(facts: Facts) -> str:
    return f"commit {facts.commit[:10]}, files {facts.sources[:8]}"


def judge_versions(everyone: Everyone) -> Iterator[Finding]:
    """Equal versions of all packages."""
    return unlike(
        everyone,
        everyone,
        lambda facts: tuple(sorted(facts.versions.items())),
        lambda one, usual: _differences(one.versions, usual.versions, usual.host),
        "install the same packages on all hosts, or start from an environment that they share",
    )


def judge_settings(everyone: Everyone) -> Iterator[Finding]:
    """Equal settings, as typed or read from --config."""
    return unlike(
        everyone,
        everyone,
        lambda facts: tuple(sorted(facts.given.settings.items())),
        lambda one, usual: _differences(one.given.settings, usual.given.settings, usual.host),
        "give all hosts the same command and the same --config",
    )


def _differences(mine: Mapping[str, str], usual: Mapping[str, str], host: str) -> str:
    """The values that differ, each with that of `host` behind it."""
    names = [name for name in {**usual, **mine} if mine.get(name) != usual.get(name)]
    return listed([f"{name} {mine.get(name)} ({host}: {usual.get(name)})" for name in names])


def judge_engine(everyone: Everyone) -> Iterator[Finding]:
    """Equal engine settings."""
    return unlike(
        everyone,
        _sound(everyone),
        lambda facts: facts.given.engine,
        lambda _, usual: f"another engine file than {usual.host}",
        "name the same file by --deepspeed on every host",
    )


def judge_data(everyone: Everyone) -> Iterator[Finding]:
    """Equal data."""
    return unlike(
        everyone,
        _sound(everyone),
        lambda facts: facts.given.data,
        lambda one, usual: (
            f"data.path holds other data (fingerprint {one.given.data[:10]}) than on "
            f"{usual.host} ({usual.given.data[:10]})"
        ),
        "copy one output of data_prep/shard.py to all hosts, or put it where all see it",
    )


def judge_folder(everyone: Everyone) -> Iterator[Finding]:
    """A folder of the run that every rank can write, and where all see the same."""
    first, folder = everyone[0], everyone[0].given.folder
    barred = [facts for facts in everyone if facts.unwritable is not None]
    if barred:
        what = f"run.path cannot be written: {barred[0].unwritable}"
        remedy = "correct it there, or choose another run.path"
        yield Finding(where(barred, everyone), what, remedy, ends_anyway=True)
        return
    blind = [facts for facts in everyone if facts.token is None or facts.token != first.token]
    if blind:
        yield Finding(
            where(blind, everyone),
            f"run.path={folder} is not the folder in which rank 0 on {first.host} writes",
            "put it on a file system that all hosts share",
        )
        return
    yield from unlike(
        everyone,
        _sound(everyone),
        lambda facts: facts.given.step,
        lambda one, usual: (
            f"finds the run at step {one.given.step}, {usual.host} at {usual.given.step}"
        ),
        "start again: the file system may show new files late; see that all hosts mount it",
    )


def judge_disk(everyone: Everyone) -> Iterator[Finding]:
    """Room for the checkpoints that will be written before any is removed."""
    short = [facts for facts in everyone if facts.free < _room(facts)]
    if short:
        worst = min(short, key=lambda facts: facts.free - _room(facts))
        yield Finding(
            where(short, everyone),
            f"{_gb(worst.free)} free at run.path={worst.given.folder}, and "
            f"{_checkpoints(worst)} {_gb(_room(worst))}",
            "make room, or choose another run.path",
        )


def _room(facts: Facts) -> float:
    return facts.given.checkpoints_to_come * facts.given.checkpoint_bytes


def _checkpoints(facts: Facts) -> str:
    return "one checkpoint takes" if facts.given.checkpoints_to_come == 1 else "two take"


def _gb(size: float) -> str:
    return f"{size / GB:,.1f} GB"


def _gpus(everyone: Everyone) -> list[tuple[Facts, GpuFacts]]:
    return [(facts, facts.gpu) for facts in everyone if facts.gpu is not None]


def _named(facts: Facts, gpu: GpuFacts) -> str:
    return f"{facts.host} (rank {facts.rank}, GPU {gpu.index})"


def judge_gpus(everyone: Everyone) -> Iterator[Finding]:
    """GPUs that are all there, of one kind, and not used by others."""
    for host in hosts(everyone):
        ours = [(facts, gpu) for facts, gpu in _gpus(everyone) if facts.host == host]
        for _, gpu in ours[:1]:
            if gpu.granted is not None and gpu.seen < gpu.granted:
                yield Finding(
                    host,
                    f"the job has {gpu.granted} GPUs, and torch sees {gpu.seen}",
                    "see what nvidia-smi says there, or leave the host out",
                )
        pids = {facts.pid for facts, _ in ours}
        for facts, gpu in ours:
            # In a container the driver may count process ids otherwise; then nobody can tell.
            if facts.pid in gpu.users and (foreign := set(gpu.users) - pids):
                pids_of_others = listed(sorted(map(str, foreign)))
                yield Finding(
                    _named(facts, gpu),
                    f"processes of others use it (pid {pids_of_others})",
                    "end them, or leave the host out",
                )
    yield from unlike(
        everyone,
        everyone,
        _kind,
        lambda one, usual: f"{_kind(one)}, unlike {usual.host} with {_kind(usual)}",
        "ask for GPUs of one kind (Slurm: --gpus-per-node=KIND:N, or --constraint)",
    )
    yield from unlike(
        everyone,
        [facts for facts, _ in _gpus(everyone)],
        _driver,
        lambda one, usual: f"driver {_driver(one)} ({usual.host}: {_driver(usual)})",
        "that may change rounding and speed",
        refuses=False,
    )


def _driver(facts: Facts) -> str:
    return "" if facts.gpu is None else facts.gpu.driver


def _kind(facts: Facts) -> str:
    return (
        "a CPU" if facts.gpu is None else f"{facts.gpu.name} of {facts.gpu.memory / 2**30:.0f} GiB"
    )


def judge_health(everyone: Everyone) -> Iterator[Finding]:
    """GPUs without faults, which compute the same product at the same speed."""
    gpus = _gpus(everyone)
    remedy = "leave the host out, and have the GPU reset or replaced"
    for facts, gpu in gpus:
        for fault in gpu.faults:
            yield Finding(_named(facts, gpu), fault, remedy)
    for kind in {_kind(facts) for facts, _ in gpus}:
        same = [(facts, gpu) for facts, gpu in gpus if _kind(facts) == kind]
        usual = median_high(gpu.flops for _, gpu in same)
        right = Counter(gpu.product for _, gpu in same).most_common(1)[0][0]
        for facts, gpu in same:
            if gpu.product != right:
                what = "a matrix product differs from that of the other GPUs of its kind"
                yield Finding(_named(facts, gpu), what, remedy)
            if gpu.flops < SLOW_GPU * usual:
                yield Finding(
                    _named(facts, gpu),
                    f"{gpu.flops / 1e12:,.0f} TFLOP/s, the others {usual / 1e12:,.0f}",
                    "see its clock, temperature and power limit (nvidia-smi -q -d PERFORMANCE), or "
                    "leave the host out",
                )


def _offsets(everyone: Everyone) -> list[float]:
    """Seconds by which each rank's clock is ahead of most; of two hosts, of that of rank 0."""
    names = hosts(everyone)
    clocks = [next(facts.clock for facts in everyone if facts.host == name) for name in names]
    reference = clocks[0] if len(names) < 3 else median(clocks)
    return [facts.clock - reference for facts in everyone]


def judge_clocks(everyone: Everyone) -> Iterator[Finding]:
    """Clocks that agree: logs, and ages of files, are compared by them."""
    for host in hosts(everyone):
        off = next(o for f, o in zip(everyone, _offsets(everyone), strict=True) if f.host == host)
        if abs(off) > CLOCK_SECONDS:
            yield Finding(
                host,
                f"its clock is {abs(off):,.0f} s {'ahead' if off > 0 else 'behind'}",
                "see that chrony or another NTP client runs there (timedatectl)",
            )


def judge_network(everyone: Everyone) -> Iterator[Finding]:
    """Links of about the same speed. Of two hosts, no one knows which is the slow one."""
    rates = {facts.rank: facts.rate for facts in everyone if facts.rate is not None}
    if len(hosts(everyone)) < 3 or not rates:
        return
    usual = median_high(rates.values())
    slow = [facts for facts in everyone if rates.get(facts.rank, usual) < SLOW_LINK * usual]
    if slow:
        worst = min(rates.values())
        yield Finding(
            where(slow, everyone),
            f"exchanges {_gb(worst)}/s with other hosts, which reach {_gb(usual)}/s",
            "see its network (ibstat, ethtool; NCCL_DEBUG=INFO tells which one NCCL takes), or "
            "leave the host out",
        )


def _show_gpus(everyone: Everyone) -> str:
    gpus = [gpu for _, gpu in _gpus(everyone)]
    if not gpus:
        return "none: the job runs on CPUs"
    kinds = [f"{len(group)} x {_kind(group[0])}" for group in groups(everyone, _kind)]
    return f"{listed(kinds)}, driver {listed(sorted({gpu.driver for gpu in gpus}))}"


def _show_health(everyone: Everyone) -> str:
    speeds = [gpu.flops / 1e12 for _, gpu in _gpus(everyone)]
    return f"{min(speeds):,.0f} to {max(speeds):,.0f} TFLOP/s" if speeds else "no GPU"


def _show_folder(everyone: Everyone) -> str:
    given = everyone[0].given
    return f"{given.folder}: {f'at step {given.step}' if given.step else 'a new run'}"


def _show_versions(everyone: Everyone) -> str:
    found = everyone[0].versions
    return ", ".join(f"{name} {version}" for name, version in [*found.items()][:5]) + ", ..."


def _show_clocks(everyone: Everyone) -> str:
    return f"at most {max(map(abs, _offsets(everyone))):.1f} s apart"


def _show_network(everyone: Everyone) -> str:
    rates = [facts.rate for facts in everyone if facts.rate is not None]
    if not rates:
        return "one host"
    return f"{min(rates) / GB:.2f} to {max(rates) / GB:.2f} GB/s for each rank, both ways"


CHECKS = [
    Check("input", lambda all_: f"data, settings, checkpoint on {len(all_)} ranks", judge_input),
    Check("code", lambda all_: _code(all_[0]), judge_code),
    Check("packages", _show_versions, judge_versions),
    Check("settings", lambda all_: f"{len(all_[0].given.settings)} settings", judge_settings),
    Check("engine file", lambda all_: f"{all_[0].given.engine_file}", judge_engine),
    Check("data", lambda all_: f"fingerprint {all_[0].given.data[:10]}", judge_data),
    Check("run.path", _show_folder, judge_folder),
    Check("disk", lambda all_: f"{_gb(min(f.free for f in all_))} free", judge_disk),
    Check("GPUs", _show_gpus, judge_gpus),
    Check("GPU health", _show_health, judge_health),
    Check("clocks", _show_clocks, judge_clocks),
    Check("network", _show_network, judge_network),
]
