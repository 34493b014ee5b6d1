"""A small model whose random weights are large enough for every path to matter."""

import pytest
import torch

from i3dist.config import ModelSettings
from i3dist.model.compressor_kinds import COMPRESSORS
from i3dist.model.lm import I3LM

BOS = 2
BUILT_IN = list(COMPRESSORS)
each_compressor = pytest.mark.parametrize("compressor", BUILT_IN)
VARIANTS = [
    {"compressor": "records", "layers": "2xrwkv,2xattention"},
    {"compressor": "literal", "layers": "2xrwkv,2xattention"},
    {"compressor": "records", "layers": "2xrwkv,2xdual-attention", "joined": "0.3"},
]
each_variant = pytest.mark.parametrize("changes", VARIANTS, ids=lambda x: "-".join(x.values()))
SMALL = {
    "vocab_size": 40,
    "d_model": 24,
    "layers": "2xrwkv,2xattention",
    "heads": 4,
    "chunk_length": 12,
    "latents": 3,
    "sub_latents": 2,
    "history_chunks": 3,
}


def build(joined: str | float | None = None, **changes: object) -> I3LM:
    """A model in fp64 with weights of standard deviation 0.3.

    Its two softmaxes are one to a share `joined`; None is a model that never was told so.
    """
    torch.manual_seed(0)
    model = I3LM(ModelSettings.model_validate(SMALL | changes), BOS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(std=0.3)
    if joined is not None:
        model.join_softmaxes(float(joined))
    return model.double()


@pytest.fixture(scope="session", params=VARIANTS, ids=lambda changes: "-".join(changes.values()))
def model(request: pytest.FixtureRequest) -> I3LM:
    """Of each kind of attention, and with each of the compressors."""
    return build(**request.param)
