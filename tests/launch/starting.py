"""What a run of two ranks starts from, or the line that refuses it."""

from pathlib import Path

import pytest

from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.engine.setup import read_engine_config
from i3dist.errors import UserError
from i3dist.training.startup import Start, resolve
from tests.conftest import QUICK, ROOT, SAVING

ENGINE = ROOT / "configs" / "zero2.json"


def begin(run: Path, data: Path, *words: str, engine: Path = ENGINE) -> Start:
    """What a run of `SAVING` starts from, as launch/train.py finds out; words may be options."""
    ours = [f"run.path={run}", f"data.path={data}", *(w for w in words if not w.startswith("--"))]
    settings = Settings.load(ROOT / "configs" / "tiny.yaml", [*QUICK[2:], *SAVING, *ours])
    corpus = Corpus.open(settings.data.path, settings.model)
    fresh = "--fresh" in words
    return resolve(settings, read_engine_config(engine), corpus, 2, fresh)


def refusal(*arguments: object, **options: object) -> str:
    with pytest.raises(UserError) as error:
        begin(*arguments, **options)  # type: ignore[arg-type]
    return str(error.value)
