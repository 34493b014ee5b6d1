"""Small trained models, exported and loaded by transformers as a user loads them."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from data_prep.tokenizer import train_tokenizer
from i3dist.checkpoint.weights import export_weights
from i3dist.config import Settings
from i3dist.data.tokenizer import Tokenizer
from i3dist.export.folder import export
from i3dist.model.lm import I3LM

# Where transformers keeps copies of modeling code; read when it is imported.
os.environ.setdefault("HF_MODULES_CACHE", tempfile.mkdtemp(prefix="i3dist-modules-"))

BOS, EOS = 2, 3
WORDS = "the cat sat on the mat and the dog sat on the log; where was the hat of the cat? "
TOKENIZER = train_tokenizer([WORDS * 9], 300)
SMALL = {
    "d_model": 24,
    "layers": "2xrwkv,2xdual-attention",
    "heads": 5,  # becomes 4 or 6: a divisor of the width
    "chunk_length": 12,
    "latents": 3,
    "sub_latents": 2,
    "history_chunks": 3,
}
# Every kind of layer and compressor, a stack of both attentions, and state that is carried.
VARIANTS: list[dict[str, Any]] = [
    {"layers": "2xrwkv,2xattention"},
    {"layers": "2xrwkv,2xattention", "compressor": "literal"},
    {"layers": "1xrwkv,2xdual-attention", "compressor": "literal", "state_carry": True},
    {
        "layers": "2xrwkv,1xdual-attention,1xattention,1xdual-attention",
        "sub_latents": 4,
        "joined": 1.0,
    },
    {"layers": "2xrwkv,2xdual-attention", "state_carry": True, "joined": 0.3},
]


def make_run(folder: Path, joined: float = 0.0, **changes: Any) -> I3LM:
    """A finished run's folder: a random model, large enough weights that every path matters.

    In its last step its two softmaxes were one to a share `joined`.
    """
    folder.mkdir(parents=True)
    (folder / "tokenizer.json").write_bytes(TOKENIZER)
    vocab = Tokenizer.load(folder / "tokenizer.json").vocab_size
    settings = Settings.build({"model": SMALL | {"vocab_size": vocab} | changes})
    settings = settings.with_values(**{"train.steps": 7})
    if joined:  # in the third step of the last three
        joining = {"compression.join_after": 4, "compression.join_steps": round(3 / joined)}
        settings = settings.with_values(**joining)
    (folder / "settings.yaml").write_text(settings.to_yaml())
    torch.manual_seed(0)
    model = I3LM(settings.model, BOS).eval()
    model.join_softmaxes(joined)
    for parameter in model.parameters():
        noise = torch.randn_like(parameter)
        parameter.data = 0.15 * noise if parameter.ndim > 1 else parameter.data + 0.1 * noise
    export_weights(folder, model, step=7)
    return model


@dataclass(frozen=True)
class Exported:
    """A model of i3dist, and the folder that it was exported to."""

    model: I3LM
    folder: Path

    def load(self, **options: Any) -> Any:
        """The model as transformers loads it."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(
            self.folder, trust_remote_code=True, **options
        ).eval()


@cache
def exported(root: Path, **changes: Any) -> Exported:
    """Of a random model with these settings, made once."""
    folder = root / "-".join(["model", *map(str, changes.values())])
    model = make_run(folder / "run", **changes)
    export(folder / "run", folder / "export")
    return Exported(model, folder / "export")


@pytest.fixture(scope="session")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where exports lie."""
    return tmp_path_factory.mktemp("exports")


@pytest.fixture(scope="session", params=VARIANTS, ids=lambda v: "-".join(map(str, v.values())))
def each(request: pytest.FixtureRequest, root: Path) -> Exported:
    """An export of each variant."""
    return exported(root, **request.param)


@pytest.fixture(scope="session")
def one(root: Path) -> Exported:
    """One export, of the default kind of layers."""
    return exported(root)


@pytest.fixture
def hf(one: Exported) -> Iterator[Any]:
    """That export, loaded."""
    return one.load()


def documents(seed: int, length: int, mean: float) -> Tensor:
    """Tokens [length] of a stream ``<BOS> text <EOS> <BOS> ...`` of documents of a mean length."""
    rng = np.random.default_rng(seed)
    tokens: list[int] = []
    while len(tokens) < length:
        tokens += [BOS, *rng.integers(13, 290, rng.geometric(1 / mean)).tolist(), EOS]
    return torch.tensor(tokens[:length])


def padded(rows: Sequence[Tensor], side: str, spare: int = 2) -> tuple[Tensor, Tensor]:
    """Rows of unequal lengths as one batch [B, N], padded on a side or in the middle, and its mask.

    At least `spare` columns of every row are padding.
    """
    width = max(map(len, rows)) + spare
    ids, mask = torch.ones(2, len(rows), width, dtype=torch.long)
    mask.zero_()
    for row, tokens in enumerate(rows):
        gap = width - len(tokens)
        start = {"left": gap, "right": 0, "middle": 0}[side]
        places = torch.arange(len(tokens)) + start
        if side == "middle":
            places[len(tokens) // 2 :] += gap
        ids[row, places], mask[row, places] = tokens, 1
    return ids, mask
