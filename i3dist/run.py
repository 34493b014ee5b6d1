"""How a run begins: what it decides once, what it continues from, what it refuses."""

from pathlib import Path

from i3dist import checkpoint, dist
from i3dist.checkpoint import RunState
from i3dist.config import Settings, first_conflict, inherit_decided
from i3dist.data.corpus import Corpus
from i3dist.errors import UserError

LANES_PER_RANK = 4


def decide(settings: Settings, world_size: int, vocab_size: int) -> Settings:
    """Replace every "auto" that a run decides when it starts and then keeps."""
    decided = {
        "train.lanes": LANES_PER_RANK * world_size,
        "optimizer.decay_steps": settings.train.steps,
        "model.vocab_size": vocab_size,
    }
    flat = settings.flat()
    return settings.with_values(**{k: v for k, v in decided.items() if flat[k] == "auto"})


def resolve(
    settings: Settings, corpus: Corpus, world_size: int, fresh: bool
) -> tuple[Settings, tuple[Path, RunState] | None]:
    """Settle the settings, and find the checkpoint that the run continues from, if any.

    Args:
        settings: as the user gave them.
        corpus: the data.
        world_size: ranks of the job.
        fresh: start over, whatever lies in the run's folder.

    Raises:
        UserError: the run's folder holds a checkpoint of other settings or other data.
    """
    path = None if fresh else checkpoint.find_latest(settings.run.path / "checkpoints")
    if path is None:
        return decide(settings, world_size, corpus.tokenizer.vocab_size), None
    state = checkpoint.read_state(path)
    saved = Settings.build(state.settings)
    settings = inherit_decided(settings, saved)
    ways_out = "choose another run.path, or start over with --fresh"
    if conflict := first_conflict(settings, saved):
        raise UserError(f"{path} is of other settings: {conflict}; {ways_out}")
    if state.data != corpus.train.manifest.fingerprint:
        raise UserError(
            f"{path} was trained on other data than {corpus.train.folder} "
            f"(fingerprints differ); name the data it had, {ways_out}"
        )
    return settings, (path, state)


def idle_lanes(settings: Settings, corpus: Corpus) -> str | None:
    """A warning where there are fewer shards than lanes, so that some lanes never work."""
    shards, lanes = len(corpus.train.manifest.shards), settings.train.lanes
    assert isinstance(lanes, int)
    if shards >= lanes:
        return None
    return (
        f"warning: {lanes} lanes but {shards} shards, so {lanes - shards} lanes idle; "
        "make smaller shards (--chunks-per-shard) or set a smaller train.lanes"
    )


def set_aside(folder: Path) -> None:
    """Rename an earlier run's folder to the first free FOLDER.1, FOLDER.2, ...: nothing is lost."""
    if not folder.exists():
        return
    number = 1
    while (target := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(target)
    dist.say(f"the earlier run now lies in {target}")


def lay_out(settings: Settings, corpus: Corpus) -> None:
    """Write what belongs to a run's folder from the start: resolved settings and tokenizer."""
    folder = settings.run.path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        settings.save(folder / "settings.yaml")
        corpus.tokenizer.save(folder / "tokenizer.json")
    except OSError as error:
        raise UserError(f"run.path={folder} cannot be written: {error.strerror}") from None
