"""The engine on a GPU, compiled and replayed as CUDA graphs, against the plain model."""

from collections.abc import Callable, Iterator, Sequence

import pytest
import torch
from torch import Tensor

from i3dist.config import ModelSettings, OptimizerSettings, TrainSettings
from i3dist.engine.interface import Engine
from i3dist.engine.setup import read_engine_config
from i3dist.engine.stock import StockEngine
from i3dist.engine.zero2 import Zero2Engine
from i3dist.model.compressor_records import RecordsCompressor
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from tests.conftest import ROOT, one_rank
from tests.model.streams import BOS, depth_of, stream

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

# The card's head size, chunk and history; two lanes of four chunks.
SIZES = ModelSettings(
    vocab_size=1000, d_model=236, heads=2, layers="2xrwkv,2xattention", chunk_length=512
)
DUAL = "2xrwkv,2xdual-attention"


@pytest.fixture(scope="module", autouse=True)
def job() -> Iterator[None]:
    with one_rank():
        yield


def build(
    compiled: bool,
    micro_batches: int = 1,
    sizes: ModelSettings = SIZES,
    kind: Callable[..., Engine] = Zero2Engine,
    joins: bool = False,
) -> Engine:
    torch.manual_seed(0)
    model = I3LM(sizes, BOS)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(2.0)
        for block in model.upper:  # a logit for each age, from each query
            block.attention.age_bias.normal_()
            block.attention.query.weight.normal_(std=2 * (0.4 / sizes.d_model) ** 0.5)
    if joins:
        model.join_softmaxes(0.0)
    if compiled:
        model.compile_blocks()
    config = read_engine_config(ROOT / "configs" / "zero2.json")
    train = TrainSettings(clip=1e9)
    trained = kind(model, config, OptimizerSettings(decay_steps=10), train)
    trained.accumulate(micro_batches)
    return trained


def window(seed: int) -> list[Tensor]:
    """Tokens, targets and depth of two lanes."""
    tokens = torch.cat([stream(seed + 9 * lane, 4, 512, 1000, 700) for lane in range(2)])
    return [x.cuda() for x in (tokens, tokens.roll(-1, -1), depth_of(tokens))]


def train(
    trained: Engine, steps: int, sizes: ModelSettings = SIZES, shares: Sequence[float] = ()
) -> tuple[list[Tensor], list[float]]:
    """Token losses and gradient norms of successive windows; the lanes' state is carried.

    Two softmaxes are one to the share of each step in `shares`.
    """
    state = LaneState.empty(2, sizes, trained.device, trained.dtype)
    gate = torch.tensor(0.7, device=trained.device)
    tokens, _, depth = window(0)
    trained.prepare(tokens, depth, state, gate)
    targets = torch.tensor(trained.micro_batches * tokens.numel(), device="cuda")
    losses, norms = [], []
    for step in range(steps):
        if shares:
            trained.model.join_softmaxes(shares[step])
        for micro_batch in range(trained.micro_batches):
            parts = window(steps * micro_batch + step)
            token_losses, state = trained(*parts, state, gate)
            trained.backward(token_losses.sum(), targets)
            losses.append(token_losses.detach().clone())
        norms.append(trained.step(1e-3).norm)
    return losses, norms


def evenly(compressor: RecordsCompressor, scores: Tensor) -> Tensor:
    """As many tokens as there are sub-latents, evenly spread: in place of the router's choice."""
    count = len(compressor.queries) * compressor.sub_latents
    step = scores.shape[-1] // count
    chosen = torch.arange(step - 1, scores.shape[-1], step, device=scores.device)
    return chosen.expand(*scores.shape[:-1], count)


def validate(trained: Engine, sizes: ModelSettings) -> Tensor:
    """Token losses of a window, as validation computes them, in another shape than recorded."""
    state = LaneState.empty(1, sizes, trained.device, trained.dtype)
    parts = [x[:1] for x in window(100)]
    with torch.no_grad():
        return trained.model(*parts, state, torch.ones((), device="cuda"))[0]


@pytest.mark.parametrize(
    ("micro_batches", "changes", "shares"),
    [
        (1, {}, ()),
        (2, {}, ()),
        (1, {"sub_latents": 1}, ()),
        (1, {"compressor": "literal"}, ()),
        (1, {"history_chunks": 2}, ()),  # fewer than a window's
        (1, {"layers": DUAL}, ()),
        (2, {"layers": DUAL}, (0.0, 0.3, 0.6, 1.0)),
    ],
)
def test_compiled_and_replayed_equals_plain(
    micro_batches: int,
    changes: dict[str, object],
    shares: Sequence[float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """To bf16's rounding: losses of every window and of validation, and norms of every gradient.

    The tokens that have sub-latents are given: rounding changes which have the highest scores, and
    another choice moves all sub-latents after it.
    """
    monkeypatch.setattr(RecordsCompressor, "choose", evenly)
    sizes = SIZES.model_copy(update=changes)
    engines = [
        build(compiled, micro_batches, sizes, joins=bool(shares)) for compiled in (True, False)
    ]
    fast, plain = (train(trained, 4, sizes, shares) for trained in engines)
    validated = [[validate(trained, sizes)] for trained in engines]
    for a, b in zip(fast[0] + validated[0], plain[0] + validated[1], strict=True):
        assert (a - b).abs().mean() < 2e-2 * b.mean()
        assert float(a.mean()) == pytest.approx(float(b.mean()), rel=2e-3)
    assert fast[1] == pytest.approx(plain[1], rel=3e-2)


def test_stock_trains_as_zero2_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled, to bf16's rounding, and each continues from the other's state."""
    monkeypatch.setattr(RecordsCompressor, "choose", evenly)
    ours, stock = (build(True, 2, kind=kind) for kind in (Zero2Engine, StockEngine))
    for first in (True, False):
        a, b = (train(trained, 4) for trained in (ours, stock))
        for x, y in zip(a[0], b[0], strict=True):
            assert float(x.mean()) == pytest.approx(float(y.mean()), rel=2e-3)
        assert a[1] == pytest.approx(b[1], rel=3e-2)
        if first:
            states = [{f.name: f.tensors for f in trained.snapshot()} for trained in (ours, stock)]
            for trained, state in zip((stock, ours), states, strict=True):
                trained.load(state, steps=4)


def test_compiled_chooses_as_plain() -> None:
    """Of equal ones the first; most are equal to others."""
    compressor = I3LM(SIZES, BOS).cuda().compressor
    scores = (torch.randn(64, 512, device="cuda") * 4).round() / 4
    compiled = torch.compile(compressor.choose, fullgraph=True)
    assert compiled(scores).equal(compressor.choose(scores))
    assert compressor.choose(scores).cpu().equal(compressor.cpu().choose(scores.cpu()))


def test_two_runs_agree_bit_for_bit() -> None:
    once, again = train(build(True), 4), train(build(True), 4)
    assert all(a.equal(b) for a, b in zip(once[0], again[0], strict=True))
    assert once[1] == again[1]


def test_a_gradient_that_is_not_finite_updates_nothing() -> None:
    trained = build(True)
    train(trained, 1)
    before = [p.detach().clone() for p in trained.model.parameters()]
    with torch.no_grad():
        trained.model.head.weight[3, 3] = float("inf")
        before[[n for n, _ in trained.model.named_parameters()].index("head.weight")][3, 3] = float(
            "inf"
        )
    _, norms = train(trained, 1)
    assert norms == [float("inf")] or norms[0] != norms[0]
    # DeepSpeed writes its fp32 weights back, which never held the infinity.
    for a, b in zip(trained.model.parameters(), before, strict=True):
        assert (a == b).sum() >= b.numel() - 1
