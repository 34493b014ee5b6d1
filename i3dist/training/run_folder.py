"""The run's folder: laid out when a run starts, and held by one process at a time."""

import errno
import fcntl
import json
import os
import socket
from pathlib import Path

import psutil

from i3dist.checkpoint import store
from i3dist.checkpoint.format import TOKENIZER
from i3dist.data.corpus import Corpus
from i3dist.distributed.console import print_rank_0
from i3dist.errors import UserError, explain
from i3dist.files import clear_partials, make_folder, regular_or_new, write_whole
from i3dist.tracking.metrics_log import STARTS, read_lines
from i3dist.training.startup import Start

# What file systems without locks answer: NFS without lockd, Lustre without flock, FUSE.
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL)


def set_aside(folder: Path) -> None:
    """Keep an earlier run: rename its folder to the first free of FOLDER.1, FOLDER.2, ..."""
    folder = folder.resolve()
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    print_rank_0(f"the earlier run is now in {target}")


def lay_out(start: Start, corpus: Corpus) -> None:
    """Prepare the run's folder on rank 0, and lock it until the process ends.

    A run that starts from step 0 begins with an empty folder. An earlier run's folder (with
    --fresh, or if it was killed before its first checkpoint) is set aside, so logs never mix.

    Raises:
        UserError: another process runs in the folder, or it cannot be written.
    """
    folder = start.settings.run.path
    try:
        if start.checkpoint is None and (folder / store.SETTINGS).exists():
            lock_folder(folder)
            set_aside(folder)
        # If the folder is a link, create its target.
        make_folder(Path(os.path.realpath(folder)))
        lock_folder(folder)
        for place in (folder, folder / store.CHECKPOINTS):
            clear_partials(place)
        write_whole(folder / store.SETTINGS, start.settings.to_yaml().encode())
        write_whole(folder / TOKENIZER, corpus.tokenizer.data)
    except OSError as error:
        raise UserError(f"run.path={folder} cannot be written: {explain(error)}") from None


def lock_folder(folder: Path) -> None:
    """Lock the folder until this process ends; the handle is never closed.

    `lockf` locks for this process alone. `flock` would share the lock with the data readers that it
    forks, which outlive it by seconds if it is killed.

    Raises:
        UserError: another process holds it.
        OSError: the lock file cannot be made.
    """
    handle = os.open(regular_or_new(folder / store.LOCK), os.O_RDWR | os.O_CREAT)
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in NO_LOCKS:
            _lock_by_name(folder, handle)
        elif error.errno in (errno.EAGAIN, errno.EACCES):
            raise _locked(folder) from None
        else:
            raise


def _locked(folder: Path) -> UserError:
    start = (read_lines(folder / STARTS) or [{}])[-1]
    job = f"job {start['job']} " if start.get("job") else ""
    who = f" (last started: {job}on {', '.join(start['hosts'])})" if start.get("hosts") else ""
    return UserError(
        f"another process runs in run.path={folder}{who}; end it first, or choose another run.path"
    )


def _lock_by_name(folder: Path, lock: int) -> None:
    """Lock a folder on a file system without locks: write this process's name into the lock file.

    Only processes of this host can tell whether the named process lives. Once it is gone its name
    means nothing, so nobody ever has to remove the file.
    """
    try:
        host, pid, started = json.loads(os.pread(lock, 4096, 0))
        there = psutil.Process(pid).create_time() == started and pid != os.getpid()
    except (ValueError, TypeError, OverflowError, psutil.Error):
        host, there = None, False  # the file names no process, or one that is gone
    if there and host == socket.gethostname():
        raise _locked(folder)
    me = [socket.gethostname(), os.getpid(), psutil.Process().create_time()]
    os.truncate(lock, 0)
    os.pwrite(lock, json.dumps(me).encode(), 0)
    print_rank_0(
        f"warning: the file system of run.path={folder} has no locks, so a job of another host "
        "that writes there too goes unnoticed: do not start one"
    )
