"""What dual attention promises beside its equations: history gets no say in how tokens are read."""

import pytest
import torch
from torch import Tensor

from i3dist.config import ModelSettings
from i3dist.model.attention import INITIAL_AGE_LOGIT
from i3dist.model.dual_attention import DualAttention
from i3dist.model.layer_kinds import Stack
from i3dist.model.lm import I3LM
from tests.model.conftest import SMALL, build
from tests.model.small import random_stream
from tests.model.streams import depth_of, empty, logits

DUAL = "2xrwkv,2xdual-attention"


def gradients(model: I3LM, tokens: Tensor, gate: float) -> dict[str, Tensor]:
    """Of the first chunk with history and all after it, in the lower attention block alone."""
    below, _ = model.below(tokens, depth_of(tokens), empty(model))
    below = below._replace(x=below.x.detach())
    hidden = model.above(below, torch.tensor(gate))
    named = dict(model.named_parameters())
    found = torch.autograd.grad(hidden.square().sum(), list(named.values()), allow_unused=True)
    return {n: torch.zeros(()) if g is None else g for n, g in zip(named, found, strict=True)}


def reading_history_only(model: I3LM) -> I3LM:
    """The model's attention reads nothing of its own chunk."""
    for block in model.upper:
        attention = block.attention
        assert isinstance(attention, DualAttention)
        attention.weigh = lambda share, own, past: share * past + 0 * own.detach()
    return model


def test_what_is_read_of_history_trains_no_projection_of_tokens() -> None:
    """Whole rows of the query's weight are logits of ages, which do learn."""
    model = reading_history_only(build(layers="2xrwkv,1xdual-attention"))
    found = gradients(model, random_stream(3, mean_document=1e9), 1.0)
    attention = model.upper[0].attention
    query = found["dual-attention.0.attention.query.weight"].unflatten(0, (attention.heads, -1))
    content, ages = query.split([attention.inner.per_head, SMALL["history_chunks"]], dim=1)
    assert not content.any()
    assert not found["dual-attention.0.attention.key_value.weight"].any()
    for learns in ("age_bias", "reserve.weight", "reserve_bias", "output.weight"):
        assert found[f"dual-attention.0.attention.{learns}"].any(), learns
    assert ages.any()
    assert found["slots.slot"].any()
    assert found["compressor.token.weight"].any()


def test_its_own_chunk_is_read_as_without_history() -> None:
    """What is added is all that history changes in the lowest block."""
    model, tokens = build(layers="2xrwkv,1xdual-attention"), random_stream(4)
    for block in model.upper:
        block.attention.weigh = lambda share, own, past: own
    torch.testing.assert_close(logits(model, tokens, 1.0), logits(model, tokens, 0.0))


def test_history_begins_low() -> None:
    """An untrained history of equal logits has e^INITIAL_AGE_LOGIT of the odds of its keys."""
    model = build(layers=DUAL)
    shares: list[Tensor] = []
    for block in model.upper:
        attention = block.attention
        attention.reset_parameters()
        attention.weigh = lambda share, own, past: shares.append(share) or own
        torch.nn.init.zeros_(attention.query.weight)
    tokens = random_stream(5, mean_document=1e9)
    logits(model, tokens)
    keys = SMALL["history_chunks"] * SMALL["latents"] * SMALL["sub_latents"]
    last = shares[0][0, -1, :, 0, 0]  # of a chunk with a whole history
    own = torch.arange(1, SMALL["chunk_length"] + 1).double()
    odds = keys / own * torch.tensor(INITIAL_AGE_LOGIT).exp()
    torch.testing.assert_close(last, odds / (1 + odds), rtol=1e-6, atol=0)


def test_keys_and_values_of_each_layer_have_views_of_their_own() -> None:
    """Another view moves what its layer sees by it, and nothing else."""
    model, tokens = build(layers=DUAL), random_stream(7, mean_document=1e9)
    below, _ = model.below(tokens, depth_of(tokens), empty(model))
    every = torch.ones(below.latents.shape[:2], dtype=torch.bool)

    def seen() -> list[Tensor]:
        return [part for layer in model.history(below.latents, every) for part in layer]

    before, token = seen(), model.compressor.token.weight
    assert len(token) == len(before) * SMALL["d_model"]
    for view in range(len(before)):
        with torch.no_grad():
            token.unflatten(0, (len(before), -1))[view] += 1.0
        after = seen()
        assert [not torch.equal(*pair) for pair in zip(before, after, strict=True)] == [
            other == view for other in range(len(before))
        ]
        before = after


@pytest.mark.parametrize(
    ("layers", "views"),
    [
        ("1xrwkv,2xattention", [range(1), range(1)]),
        ("1xrwkv,2xdual-attention", [range(2), range(2, 4)]),
        (
            "1xrwkv,1xattention,2xdual-attention,1xattention",
            [range(1), range(1, 3), range(3, 5), range(1)],
        ),
    ],
)
def test_layers_without_views_of_their_own_share_one(layers: str, views: list[range]) -> None:
    settings = ModelSettings.model_validate(SMALL | {"layers": layers})
    assert Stack.of(settings).views == views
    model, tokens = build(layers=layers), random_stream(8, mean_document=1e9)
    assert len(model.compressor.token.weight) == SMALL["d_model"] * max(v.stop for v in views)
    assert not torch.equal(logits(model, tokens, 1.0), logits(model, tokens, 0.0))


@pytest.mark.parametrize("kind", ["attention", "dual-attention"])
def test_no_history_means_none_of_it_counts(kind: str) -> None:
    """In documents of one chunk the gate changes nothing."""
    model = build(layers=f"2xrwkv,2x{kind}")
    tokens = random_stream(6, mean_document=1e9)
    tokens[..., 0] = 2
    torch.testing.assert_close(logits(model, tokens, 1.0), logits(model, tokens, 0.0))
