"""How a run begins: what it decides once, what it continues from, what it refuses."""

import errno
import fcntl
import json
import os
import socket
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from i3dist.checkpoint import format as checkpoint
from i3dist.checkpoint import store
from i3dist.checkpoint.run_state import RunState
from i3dist.config import OnDamage, Settings
from i3dist.data.corpus import Corpus
from i3dist.data.schedule import NEWEST
from i3dist.data.shards import check_shards
from i3dist.data.tokenizer import Tokenizer
from i3dist.distributed import collectives
from i3dist.distributed.job import Job
from i3dist.engine.config_file import numeric_part
from i3dist.errors import UserError, explain
from i3dist.files import clear_partials, write_whole
from i3dist.training.continuing import first_conflict, inherit_decided, of_saved_run

LANES_PER_RANK = 4
WAYS_OUT = "choose another run.path, or start over with --fresh"
# What file systems say that have no locks: NFS without lockd, Lustre without flock, FUSE.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Start:
    """Where a run starts from."""

    settings: Settings  # no "auto" is left that a run decides
    checkpoint: Path | None = None  # None starts from step 0
    state: RunState | None = None


def decide(settings: Settings, world_size: int, vocab_size: int) -> Settings:
    """Replace every "auto" that a run decides when it starts and then keeps.

    Raises:
        UserError: the learning rate's curve is no longer than its warm-up.
    """
    settings.optimizer.check_curve(settings.place_of("optimizer.decay_steps"))
    steps, warmup = settings.train.steps, settings.optimizer.warmup_steps
    decided = {
        "train.lanes": LANES_PER_RANK * world_size,
        "train.schedule": NEWEST,
        "optimizer.decay_steps": steps if steps > warmup else 2 * warmup,
        "model.vocab_size": vocab_size,
    }
    flat = settings.flat()
    return settings.with_values(**{k: v for k, v in decided.items() if flat[k] == "auto"})


def resolve(
    settings: Settings, engine_config: dict[str, Any], corpus: Corpus, world_size: int, fresh: bool
) -> Start:
    """Settle the settings, and find the checkpoint that the run continues from, if any.

    Args:
        settings: as the user gave them.
        engine_config: the engine's file.
        corpus: the data.
        world_size: ranks of the job.
        fresh: start over, whatever lies in the run's folder.

    Raises:
        UserError: the run's folder holds a checkpoint of other settings or other data.
    """
    there = [] if fresh else store.candidates(settings.run.path / store.CHECKPOINTS)
    found = store.newest_whole(there, checkpoint.glance)
    if found is None:
        return Start(decide(settings, world_size, corpus.tokenizer.vocab_size))
    path = found.path
    state = checkpoint.read_state(path)
    saved = of_saved_run(Settings.build(state.settings))
    settings = inherit_decided(settings, saved)
    if conflict := first_conflict(settings, saved):
        raise UserError(f"{path} is of other settings: {conflict}; {WAYS_OUT}")
    if numeric_part(state.engine) != numeric_part(engine_config):
        raise UserError(
            f"{path} was made with other engine settings: {numeric_part(engine_config)} but the "
            f"saved run has {state.engine}; {WAYS_OUT}"
        )
    _check_data(path, state, settings, corpus)
    if state.step > settings.train.steps:
        raise UserError(
            f"{path} is beyond train.steps={settings.train.steps}: the run has taken {state.step} "
            f"steps; raise train.steps, {WAYS_OUT}"
        )
    return Start(settings, path, state)


def _check_data(path: Path, state: RunState, settings: Settings, corpus: Corpus) -> None:
    """See that the data are those that a checkpoint was trained on; raises `UserError`."""
    if state.data == corpus.fingerprint:
        return
    trained_with = settings.run.path / "tokenizer.json"
    other = trained_with.exists() and Tokenizer.load(trained_with).sha256 != corpus.tokenizer.sha256
    has = f"another tokenizer than {trained_with}" if other else "other shards"
    raise UserError(
        f"{path} was trained on other data than data.path={settings.data.path}, which has {has}; "
        f"name the data it had, {WAYS_OUT}"
    )


def agree(start: Start) -> None:
    """See that every rank starts alike.

    Raises:
        UserError: on every rank, where they see different folders.
    """
    mine = (start.state.step if start.state else 0, start.settings.to_yaml())
    starts = collectives.gather_objects(mine)
    if any(other != starts[0] for other in starts):
        raise UserError(
            f"run.path={start.settings.run.path} is not the same folder on every host; "
            "put it on a file system that they share"
        )


def verify(start: Start, job: Job) -> Start:
    """Read all of the checkpoint that the run continues from; where it is broken, fall back.

    Every rank calls this, and all take the same one: the newest whole one.

    Raises:
        UserError: on every rank, where none is whole.
    """
    if start.checkpoint is None:
        return start
    found = checkpoint.newest_whole(start.settings.run.path / store.CHECKPOINTS, job)
    assert found is not None
    if found.refused:
        collectives.say(found.line())
    return replace(start, checkpoint=found.path, state=checkpoint.read_state(found.path))


def preflight(corpus: Corpus, on_damage: OnDamage, job: Job) -> None:
    """See that no shard is missing or cut, before any is read; every rank calls this.

    The first rank of each host looks, for all of that host.

    Raises:
        UserError: on every rank, where one is.
    """

    def look() -> None:
        try:
            check_shards(corpus.train.folder, corpus.train.manifest, on_damage)
            check_shards(corpus.valid.folder, corpus.valid.manifest)
        except UserError as error:
            where = f" (on {socket.gethostname()})" if job.hosts > 1 else ""
            raise UserError(f"{error}{where}") from None

    collectives.together(look if job.local_rank == 0 else lambda: None)


def idle_lanes(settings: Settings, corpus: Corpus) -> str | None:
    """A warning where there are fewer shards than lanes: lanes idle, or read the same at once."""
    shards, lanes = len(corpus.train.manifest.shards), settings.train.lane_count
    if shards >= lanes:
        return None
    idle = settings.train.schedule_version == 1
    what = f"{lanes - shards} lanes idle" if idle else "a step reads shards of several epochs"
    return (
        f"warning: {lanes} lanes but {shards} shards, so {what}; "
        "make smaller shards (--chunks-per-shard) or set a smaller train.lanes"
    )


def set_aside(folder: Path) -> None:
    """Rename an earlier run's folder to the first free FOLDER.1, FOLDER.2, ...: nothing is lost."""
    folder = folder.resolve()
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    collectives.say(f"the earlier run now lies in {target}")


def lay_out(start: Start, corpus: Corpus) -> None:
    """Prepare the run's folder on rank 0, and hold it until the process ends.

    A run that starts from step 0 begins with an empty folder: what an earlier one left there (with
    --fresh, or killed before its first checkpoint) is set aside, so that their logs never mix.

    Raises:
        UserError: another process runs in the folder, or it cannot be written.
    """
    folder = start.settings.run.path
    try:
        if start.checkpoint is None and (folder / "settings.yaml").exists():
            _hold(folder)
            set_aside(folder)
        # Of a link, what it leads to.
        Path(os.path.realpath(folder)).mkdir(parents=True, exist_ok=True)
        _hold(folder)
        for place in (folder, folder / store.CHECKPOINTS):
            clear_partials(place)
        write_whole(folder / "settings.yaml", start.settings.to_yaml().encode())
        write_whole(folder / "tokenizer.json", corpus.tokenizer.data)
    except OSError as error:
        raise UserError(f"run.path={folder} cannot be written: {explain(error)}") from None


def _hold(folder: Path) -> None:
    """Lock the folder for as long as this process lives; the handle is never closed.

    The lock is this process's alone. `flock` would be shared with readers of data that it forks,
    which outlive it by seconds where it is killed.
    """
    handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            _sign(folder, handle)
        elif error.errno in (errno.EAGAIN, errno.EACCES):
            raise _held(folder) from None
        else:
            raise


def _held(folder: Path) -> UserError:
    return UserError(
        f"another process runs in run.path={folder}; end it first, or choose another run.path"
    )


def _sign(folder: Path, lock: int) -> None:
    """Hold a folder whose file system has no locks: by a file that names this process.

    That is seen by later processes on this host only, and means nothing once this one is gone, so
    nobody ever has to remove it.
    """
    try:
        host, pid, started = json.loads(os.pread(lock, 4096, 0))
        there = psutil.Process(pid).create_time() == started and pid != os.getpid()
    except (ValueError, TypeError, OverflowError, psutil.Error):
        # Nobody signed it, or who did is gone.
        host, there = None, False
    if there and host == socket.gethostname():
        raise _held(folder)
    me = [socket.gethostname(), os.getpid(), psutil.Process().create_time()]
    os.truncate(lock, 0)
    os.pwrite(lock, json.dumps(me).encode(), 0)
    collectives.say(
        f"warning: the file system of run.path={folder} has no locks, so a job of another host "
        "that writes there too would not be noticed: start none"
    )
