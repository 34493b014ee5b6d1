"""Two softmaxes that become one: none of it at j = 0, all of it at j = 1, and a share between."""

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from i3dist.inference.batch_decoder import BatchDecoder
from i3dist.inference.decoder import Decoder
from i3dist.model.dual_attention import DualAttention
from i3dist.model.lm import I3LM
from tests.model.conftest import build
from tests.model.small import random_stream, training_loss
from tests.model.streams import empty, logits

ONE, TWO = "2xrwkv,2xattention", "2xrwkv,2xdual-attention"
VIEWS = 4  # of two layers of dual attention


def trained(model: I3LM, tokens: Tensor) -> dict[str, Tensor]:
    """Gradients by parameter, and under "" the loss."""
    named = dict(model.named_parameters())
    loss = training_loss(model, tokens, empty(model))
    found = torch.autograd.grad(loss, list(named.values()))
    return {"": loss.detach(), **dict(zip(named, found, strict=True))}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_at_0_nothing_changes_bit_for_bit(dtype: torch.dtype) -> None:
    tokens = random_stream(3)
    never, at_0, at_1 = (trained(build(j, layers=TWO).to(dtype), tokens) for j in (None, 0, 1))
    assert all(part.equal(at_0[name]) for name, part in never.items())
    assert not never[""].equal(at_1[""])


def test_at_1_it_is_attention_with_one_softmax() -> None:
    """Loss and gradients, where both read history through the same view and r is 0."""
    one, two = build(layers=ONE), build(1.0, layers=TWO)
    shared = {name.replace("attention", "dual-attention", 1) if name.startswith("attention")
              else name: part for name, part in one.state_dict().items()}  # fmt: skip
    shared["compressor.token.weight"] = shared["compressor.token.weight"].repeat(VIEWS, 1)
    missing, unknown = two.load_state_dict(shared, strict=False)
    assert not unknown and all("reserve" in name for name in missing)
    for block in two.upper:
        torch.nn.init.zeros_(block.attention.reserve.weight)
    tokens = random_stream(3)
    wanted, found = trained(one, tokens), trained(two, tokens)
    token = found["compressor.token.weight"]
    found["compressor.token.weight"] = token.unflatten(0, (VIEWS, -1)).sum(0)
    for name, part in wanted.items():
        theirs = name.replace("attention", "dual-attention", 1) if name.startswith("att") else name
        torch.testing.assert_close(found[theirs], part, rtol=1e-9, atol=1e-11, msg=name)


def test_what_history_teaches_tokens_grows_with_j() -> None:
    """j times what it teaches at 1, while what is read stays the same."""
    tokens, found = random_stream(3, mean_document=1e9), []
    for j in (0.0, 0.3, 1.0):
        model = build(j, layers="2xrwkv,1xdual-attention")
        model.upper[0].attention.weigh = lambda share, own, past: own + share * past
        found.append(trained(model, tokens))
    none, some, all_ = found
    for name, part in some.items():
        torch.testing.assert_close(part - none[name], 0.3 * (all_[name] - none[name]), msg=name)
    for name in ("query.weight", "key_value.weight"):
        assert not some[f"dual-attention.0.attention.{name}"].allclose(
            none[f"dual-attention.0.attention.{name}"]
        )


@pytest.mark.parametrize("joined", [None, 0.0, 0.3, 1.0])
@torch.no_grad()
def test_a_document_is_decoded_as_it_was_trained(joined: float | None) -> None:
    model, tokens = build(joined, layers=TWO), random_stream(4, mean_document=60)
    wanted, flat = logits(model, tokens)[0].flatten(0, 1), tokens.flatten()
    at_once, by_one = BatchDecoder(model, [flat[:5]]), Decoder(model)
    by_one.feed(flat[:5])
    for token, row in zip(flat[5:], wanted[5:], strict=True):
        for found in (at_once.feed(token[None])[0], by_one.feed(token[None])):
            torch.testing.assert_close(found.double(), row, rtol=1e-5, atol=1e-5)


def test_another_share_compiles_nothing_again() -> None:
    """Nor does it record anew: the share is a tensor, which changes in place."""
    model = build(0.0, layers=TWO).float()
    attention = model.upper[0].attention
    assert isinstance(attention, DualAttention)
    joined, counter = attention.joined, CompileCounter()
    read = torch.compile(lambda own, past: attention.weigh(own, own, past), backend=counter)
    own, past = torch.randn(2, 1, 2, 3, 4, 8, generator=torch.Generator().manual_seed(0))
    for j in (0.0, 0.3, 1.0):
        model.join_softmaxes(j)
        assert attention.joined is joined
        torch.testing.assert_close(read(own, past), own + own * (past - j * own))
    assert counter.frame_count == 1
