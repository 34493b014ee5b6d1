"""Compressors: which tokens sub-latents are of, what they read, and how the router learns; what the
literal one reads; and the setting that chooses between them."""

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from i3dist.config import ModelSettings, Settings
from i3dist.errors import UserError
from i3dist.model.compressor_literal import LiteralCompressor
from i3dist.model.compressor_records import NOT_KEPT, RecordsCompressor
from i3dist.model.lm import I3LM
from i3dist.ops.linear import linear
from tests.conftest import error_line, program
from tests.model.conftest import BOS, SMALL, build
from tests.model.small import CLOSE, EXACT, T, seeds


@pytest.fixture(scope="module")
def model() -> I3LM:
    """With sub-latents."""
    return build()


@pytest.fixture(scope="module")
def literal() -> I3LM:
    return build(compressor="literal")


@given(seed=seeds, kept=st.integers(1, T))
@settings(max_examples=30, deadline=None)
def test_sub_latents_are_of_the_highest_scores_in_order(model: I3LM, seed: int, kept: int) -> None:
    """As many as there are, of equal ones the first; none is of a token that is not kept."""
    compressor, count = model.compressor, model.keys_per_chunk
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 6, (2, T), generator=random).double()  # many are equal
    scores[:, kept:] = NOT_KEPT
    for row, chosen in zip(scores.tolist(), compressor.choose(scores).tolist(), strict=True):
        assert chosen == sorted(sorted(range(T), key=lambda t: (-row[t], t))[:count])
    hidden = torch.randn(2, T, model.width.computed, generator=random).double()
    keep = scores > NOT_KEPT
    latents = model.width.trim(compressor(hidden, keep))
    parts = latents.unflatten(-1, (compressor.sub_latents, -1))
    filled = parts.flatten(1, 2).abs().sum(-1) > 0
    assert filled.sum(-1).tolist() == [min(kept, count)] * 2
    for anything in (7.0, float("inf"), float("nan")):
        other = hidden.masked_fill(~keep.unsqueeze(-1), anything)
        assert torch.equal(compressor(other, keep), compressor(hidden, keep))


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
def test_a_sub_latent_begins_by_reading_its_own_token(model: I3LM, seed: int) -> None:
    """Nearly; what it reads is kept, and sums to 1."""
    torch.manual_seed(seed)
    normed = torch.randn(2, T, model.width.computed).double()
    keep = torch.rand(2, T) < 0.7
    keep[:, seed % T] = True
    compressor, count = model.compressor, model.keys_per_chunk
    chosen = compressor.choose(torch.randn(2, T).masked_fill(~keep, NOT_KEPT))
    query, key, _ = compressor.project_in(normed, keep)
    shares = compressor.shares(chosen, query, key, keep)
    torch.testing.assert_close(shares.sum(-1), torch.ones_like(shares[..., 0]))
    assert not shares[~keep[:, None].expand_as(shares)].any()
    own = torch.arange(T) == chosen.unsqueeze(-1)
    first = compressor.shares(chosen, 0 * query, 0 * key, torch.ones_like(keep))
    assert first[own].min() > 0.9
    assert shares.shape == (2, count, T)


def test_projecting_sub_latents_equals_projecting_what_they_unfold_to(model: I3LM) -> None:
    torch.manual_seed(0)
    latents = torch.randn(2, 3, SMALL["latents"], model.width.computed).double()
    weight = torch.randn(5, model.width.computed).double()
    unfolded = model.compressor.token(model.compressor.split(latents))  # by all views
    for view, seen in enumerate(unfolded.chunk(model.compressor.views, dim=-1)):
        found = model.compressor.project(latents, weight, view)
        torch.testing.assert_close(found, linear(seen, weight), **CLOSE)


@given(seed=seeds)
@settings(max_examples=20, deadline=None)
@torch.no_grad()
def test_the_compressor_is_what_its_words_say(model: I3LM, seed: int) -> None:
    """One sub-latent after the other: choose, ask, read; then refine, normalise and size."""
    c, count = model.compressor, model.keys_per_chunk
    each = c.part.stored
    torch.manual_seed(seed)
    hidden = model.width.pad(torch.randn(1, T, model.width.stored).double())
    keep = torch.arange(T)[None] >= seed % T  # a chunk's last document
    found = model.width.trim(c(hidden, keep))[0].reshape(count, each)
    normed, kept = c.norm_in(hidden)[0], keep[0].nonzero().flatten().tolist()
    query, key, value = (c.part.trim(p(normed)) for p in (c.query, c.key, c.record))
    scores = model.width.trim(normed) @ c.salience.weight[0]
    best = sorted(sorted(kept, key=lambda t: -scores[t].item())[:count])
    empty = count - len(best)
    assert not found[:empty].any()
    latents = c.queries.reshape(count, each).clone()
    for i, own in enumerate(best, start=empty):
        asked = key[kept] @ (query[own] + c.queries.reshape(count, each)[i]) / each**0.5
        begins = [0.94 * (t == own) + 0.05 / 17 * (abs(t - own) <= 8) + 0.01 / T for t in kept]
        shares = (asked + torch.tensor(begins).double().log()).softmax(0)
        latents[i] += shares @ value[kept]
    whole = range(-(-empty // c.sub_latents) * c.sub_latents, count)  # of latents that are full
    x = model.width.pad(latents.reshape(-1, c.sub_latents * each))
    x = model.width.trim(x + c.ff(c.norm_ff(x))).reshape(count, each)
    for i in whole:
        wanted = c.part.trim(c.norm_out(c.part.pad(x[i])))
        wanted = wanted * 2 * scores[best[i - empty]].sigmoid()
        torch.testing.assert_close(found[i], wanted, rtol=1e-6, atol=1e-6)


def test_the_router_learns_from_what_sub_latents_are_of_use_for(model: I3LM) -> None:
    """A token whose sub-latent lowers the loss gets a higher score by a step down the gradient."""
    compressor = model.compressor
    torch.manual_seed(0)
    hidden, keep = torch.randn(1, T, model.width.computed).double(), torch.ones(1, T).bool()
    chosen = compressor.choose(compressor.router_scores(compressor.norm_in(hidden)))[0]
    wanted = compressor(hidden, keep).detach()
    wanted[:, 1:] = 0  # the first latent's sub-latents should be larger, the others smaller
    loss = (compressor(hidden, keep) - 3 * wanted).square().sum()
    weight = compressor.salience.weight
    (gradient,) = torch.autograd.grad(loss, weight)
    moved = compressor.norm_in(hidden)[..., : weight.shape[1]] @ -gradient[0]
    first = compressor.sub_latents
    assert (moved[0, chosen[:first]].mean() > moved[0, chosen[first:]].mean()).item()


@given(seed=seeds, kept=st.integers(1, T))
@settings(max_examples=30, deadline=None)
@torch.no_grad()
def test_a_literal_latent_reads_all_that_is_kept_and_nothing_else(
    literal: I3LM, seed: int, kept: int
) -> None:
    torch.manual_seed(seed)
    hidden = literal.width.pad(torch.randn(2, T, literal.width.stored).double())
    keep = torch.rand(2, T).argsort(-1) < kept
    latents = literal.compressor(hidden, keep)
    assert latents.shape == (2, SMALL["latents"], literal.width.computed)
    assert not latents[..., literal.width.stored :].any(), "padded channels stay 0"
    for anything in (7.0, float("inf"), float("nan")):
        other = hidden.masked_fill(~keep.unsqueeze(-1), anything)
        torch.testing.assert_close(literal.compressor(other, keep), latents, **EXACT)
    for row, position in keep.nonzero().tolist():
        changed = hidden.clone()
        changed[row, position, 0] += 1
        moved = (literal.compressor(changed, keep) - latents).abs().amax(-1)
        assert moved[row].min() > 0 and not moved[1 - row].any()


@torch.no_grad()
def test_chunks_are_compressed_one_by_one_whatever_their_number(literal: I3LM) -> None:
    """Any leading dimensions, also none."""
    torch.manual_seed(0)
    hidden = literal.width.pad(torch.randn(2, 3, T, literal.width.stored).double())
    keep = torch.arange(T) >= torch.randint(T, (2, 3, 1))
    latents = literal.compressor(hidden, keep)
    for lane in range(2):
        for chunk in range(3):
            one = literal.compressor(hidden[lane, chunk], keep[lane, chunk])
            torch.testing.assert_close(one, latents[lane, chunk], **CLOSE)


def test_the_literal_compressor_has_the_parameters_of_its_formula() -> None:
    sizes = ModelSettings.model_validate(SMALL | {"compressor": "literal"})
    compressor = I3LM(sizes, BOS).compressor
    d, m, mult = sizes.d_model, sizes.latents, sizes.ff_mult
    count = sum(p.numel() for p in compressor.parameters())
    assert count == (4 + 2 * mult) * d * d + (m + 6) * d


def test_the_setting_chooses_the_compressor() -> None:
    found = {name: type(build(compressor=name).compressor) for name in ("records", "literal")}
    assert found == {"records": RecordsCompressor, "literal": LiteralCompressor}
    assert type(build().compressor) is RecordsCompressor


@pytest.mark.parametrize("sub_latents", [1, 2, 4])
def test_the_literal_compressor_ignores_sub_latents(literal: I3LM, sub_latents: int) -> None:
    """The same keys, parameters and first weights."""
    model = build(compressor="literal", sub_latents=sub_latents)
    assert model.keys_per_chunk == SMALL["latents"] == len(model.slots.slot)
    for (name, one), (_, other) in zip(
        model.named_parameters(), literal.named_parameters(), strict=True
    ):
        assert one.equal(other), name


def test_an_unknown_compressor_is_one_line(tmp_path: Path) -> None:
    settings = Settings.load(None, ["model.compressor=means"]).model
    says = "unknown model.compressor 'means': use literal, records, or one of your own with --ext"
    with pytest.raises(UserError, match=f"^{says}"):
        I3LM(settings, BOS)
    file = tmp_path / "my.yaml"
    file.write_text("model:\n  compressor: means\n")
    line = error_line(program("launch/train.py", "--dry-run", "--config", file))
    assert f"{file}, line 2: {says}" in line
