"""How a run starts: what it decides once, what it continues from, and what it refuses."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from i3dist.aside import aside
from i3dist.checkpoint import store, verify
from i3dist.checkpoint.format import TOKENIZER, RunState, read_state
from i3dist.checkpoint.weights import SavedModel
from i3dist.config import OnDamage, Settings
from i3dist.data.corpus import Corpus
from i3dist.data.schedule import NEWEST
from i3dist.data.shards import check_shards
from i3dist.data.tokenizer import Tokenizer
from i3dist.distributed import collectives
from i3dist.distributed.attempt import Attempt
from i3dist.distributed.job import Job, host_name
from i3dist.engine.config_file import numeric_part
from i3dist.errors import UserError
from i3dist.tracking.metrics_log import STARTS, read_lines
from i3dist.training.continuing import fill, first_conflict, inherit_decided
from i3dist.training.init_from import initial_weights, join_after

LANES_PER_RANK = 4
# 65M to 98M tokens of one GPU's 4 lanes. Attention has by then learned to read its own chunk, which
# took 30M to 35M tokens (docs/history.md).
JOIN_AFTER, JOIN_STEPS = 4000, 2000
WAYS_OUT = "choose another run.path, or start over with --fresh"


@dataclass(frozen=True)
class Start:
    """What a run starts from."""

    settings: Settings  # without any "auto" that a run decides
    checkpoint: Path | None = None  # None starts from step 0
    state: RunState | None = None
    weights: SavedModel | None = None  # that a run from step 0 begins with; None initializes them


def decide(
    settings: Settings, world_size: int, vocab_size: int, weights: SavedModel | None = None
) -> Settings:
    """Replace every "auto" that a run decides when it starts, and then keeps.

    Args:
        settings: as the user gave them.
        world_size: ranks of the job.
        vocab_size: entries of the data's tokenizer.
        weights: that the run begins with; None initializes them.

    Raises:
        UserError: the learning-rate curve is not longer than its warm-up.
    """
    settings.optimizer.check_curve(settings.place_of("optimizer.decay_steps"))
    steps, warmup = settings.train.steps, settings.optimizer.warmup_steps
    joins = settings.compression.join_steps
    joins = JOIN_STEPS if joins == "auto" else joins
    decided = {
        "compression.join_after": JOIN_AFTER if weights is None else join_after(weights, joins),
        "compression.join_steps": joins,
        "train.lanes": LANES_PER_RANK * world_size,
        "train.schedule": NEWEST,
        "optimizer.decay_steps": steps if steps > warmup else 2 * warmup,
        "model.vocab_size": vocab_size,
    }
    return fill(settings, decided)


def starts_over(fresh: bool, run: Path, attempt: Attempt) -> bool:
    """Whether --fresh counts: in a job that its launcher starts again, until it has begun its run.

    Args:
        fresh: whether it was typed.
        run: the run's folder.
        attempt: which start of the job this is.
    """
    return fresh and not (attempt.restarts and _starts_of(run, attempt))


def check_attempt(settings: Settings, fresh: bool) -> bool:
    """Whether this start of the job starts over, if it may go on; `fresh` says what was typed.

    It reads nothing of the data: they may be what hung at the starts before.

    Raises:
        UserError: as `check_progress`.
    """
    attempt = Attempt.detect()
    fresh = starts_over(fresh, settings.run.path, attempt)
    if 0 < settings.guard.requeues <= attempt.restarts:
        path = newest_checkpoint(settings.run.path, fresh)
        check_progress(settings, 0 if path is None else read_state(path).step, attempt)
    return fresh


def check_progress(settings: Settings, step: int, attempt: Attempt) -> None:
    """Stop a job that is started again and again and never gets to a new checkpoint.

    What counts is how often the launcher has started the job again, whoever asked for that, since
    the attempt that made the newest checkpoint, which is of `step`.

    Raises:
        UserError: `guard.requeues` attempts in a row have made none.
    """
    most = settings.guard.requeues
    fruitful = [
        int(line["restarts"]) + 1
        for line in _starts_of(settings.run.path, attempt)
        if line["step"] < step
    ]
    fruitless = attempt.restarts - max(fruitful, default=0)
    if 0 < most <= fruitless:
        raise UserError(
            f"{attempt.name}: {fruitless} starts in a row have made no new checkpoint (the "
            f"newest is of step {step}), so it stops (guard.requeues={most}); see above what ended "
            "them, then type the same command again"
        )


def newest_checkpoint(run: Path, fresh: bool) -> Path | None:
    """What the run continues from, by file names and sizes; None if it starts from step 0.

    Raises:
        UserError: there are checkpoints, and none is whole.
    """
    there = [] if fresh else store.candidates(run / store.CHECKPOINTS)
    return store.first_whole(there, verify.quick_fault)[0]


def _starts_of(run: Path, attempt: Attempt) -> list[dict[str, Any]]:
    """The lines of this job in the record of the run's starts, the newest first.

    Jobs of torchrun that nobody gave a name have one id. The restarts of a job count up, so the
    first line with no fewer restarts than the start after it is of another job. One with fewer may
    be, too, if this job has noted no start yet: a name (--rdzv-id) tells them apart.
    """
    lines = read_lines(run / STARTS) if attempt.job is not None else []
    found: list[dict[str, Any]] = []
    for line in reversed([line for line in lines if line.get("job") == attempt.job]):
        if int(line["restarts"]) >= (int(found[-1]["restarts"]) if found else attempt.restarts):
            break
        found.append(line)
    return found


def resolve(
    settings: Settings, engine_config: dict[str, Any], corpus: Corpus, world_size: int, fresh: bool
) -> Start:
    """Decide the settings, and find the checkpoint that the run continues from, if any.

    Args:
        settings: as the user gave them.
        engine_config: the engine's file.
        corpus: the data.
        world_size: ranks of the job.
        fresh: start over, whatever is in the run's folder.

    Raises:
        UserError: the run's folder has a checkpoint of other settings or other data, or a new run
            cannot begin with the weights of train.init_from.
    """
    path = newest_checkpoint(settings.run.path, fresh)
    if path is None:
        return begin(settings, corpus, world_size)
    state = read_state(path)
    saved = Settings.build(state.settings).of_saved_run()
    settings = inherit_decided(settings, saved)
    ended = state.step >= saved.train.steps
    if conflict := first_conflict(settings, saved, ended):
        raise UserError(f"{path} is of other settings: {conflict}, {WAYS_OUT}")
    if settings.optimizer.decay_steps != saved.optimizer.decay_steps:
        settings.optimizer.check_curve()
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


def begin(settings: Settings, corpus: Corpus | None, world_size: int) -> Start:
    """Decide the settings of a run from step 0; arguments and errors are those of `resolve`."""
    weights = initial_weights(settings, corpus)
    known = corpus if weights is None else weights  # which has the data's tokenizer
    vocab_size = settings.model.vocab if known is None else known.tokenizer.vocab_size
    return Start(decide(settings, world_size, vocab_size, weights), weights=weights)


def foresee(settings: Settings, corpus: Corpus | None, world_size: int, fresh: bool) -> Settings:
    """The settings that `resolve` would decide; one that it would refuse stays as it was given.

    Without data (None) the vocabulary is that of train.init_from, or the card's.
    """
    path = newest_checkpoint(settings.run.path, fresh)
    if path is None:
        return begin(settings, corpus, world_size).settings
    return inherit_decided(settings, Settings.build(read_state(path).settings).of_saved_run())


def _check_data(path: Path, state: RunState, settings: Settings, corpus: Corpus) -> None:
    """Raise `UserError` unless the checkpoint was trained on these data."""
    if state.data == corpus.fingerprint:
        return
    trained_with = settings.run.path / TOKENIZER
    other = trained_with.exists() and Tokenizer.load(trained_with).sha256 != corpus.tokenizer.sha256
    has = f"another tokenizer than {trained_with}" if other else "other shards"
    raise UserError(
        f"{path} was trained on other data than data.path={settings.data.path}, which has {has}; "
        f"name the data it had, {WAYS_OUT}"
    )


def agree(start: Start) -> None:
    """Check that all ranks start from the same step with the same settings.

    Raises:
        UserError: on every rank, if they do not: they see different folders.
    """
    mine = (start.state.step if start.state else 0, start.settings.to_yaml())
    starts = collectives.gather_objects(mine)
    if any(other != starts[0] for other in starts):
        raise UserError(
            f"run.path={start.settings.run.path} is not the same folder on every host; "
            "put it on a file system that they share"
        )


def verify_checkpoint(start: Start, job: Job) -> Callable[[], Start]:
    """Begin to read all of the checkpoint that the run continues from, in a thread.

    Every rank calls this, and what it returns, which waits for the thread. That gives where the run
    starts: from an older checkpoint if this one is broken, on all ranks the same.

    Raises:
        UserError: on every rank, from what is returned, if no checkpoint is whole.
    """
    if start.checkpoint is None:
        return lambda: start
    folder = start.settings.run.path / store.CHECKPOINTS
    newest = next(iter(store.candidates(folder)), start.checkpoint)
    # Why `resolve` has passed over a newer one is said with the faults that reading finds.
    passed_over = None if newest == start.checkpoint else f"{newest} is not whole"
    found = aside(partial(verify.fault_of_share, start.checkpoint, job), "checkpoint")

    def verified() -> Start:
        if verify.first_fault(found() or passed_over) is None:
            return start
        path = verify.newest_whole(folder, job)
        assert path is not None
        return replace(start, checkpoint=path, state=read_state(path))

    return verified


def check_data(corpus: Corpus, on_damage: OnDamage, job: Job) -> None:
    """Check that no shard is missing or cut, before any is read.

    The first rank of each host checks for all ranks of that host.

    Raises:
        UserError: a shard is missing or cut.
    """
    if job.local_rank != 0:
        return
    try:
        check_shards(corpus.train.folder, corpus.train.manifest, on_damage)
        check_shards(corpus.valid.folder, corpus.valid.manifest)
    except UserError as error:
        where = f" (on {host_name()})" if job.local_world_size < job.world_size else ""
        raise UserError(f"{error}{where}") from None


def idle_lanes(settings: Settings, corpus: Corpus) -> str | None:
    """A warning if there are fewer shards than lanes: lanes idle, or read the same data at once."""
    shards, lanes = len(corpus.train.manifest.shards), settings.train.lane_count
    if shards >= lanes:
        return None
    idle = settings.train.schedule_version == 1
    what = f"{lanes - shards} lanes idle" if idle else "a step reads shards of several epochs"
    return (
        f"warning: {lanes} lanes but {shards} shards, so {what}; "
        "make smaller shards (--chunks-per-shard) or set a smaller train.lanes"
    )
