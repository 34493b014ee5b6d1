"""benchmarks/train_throughput.py at toy size: its opponents are what it says, its figures right."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from i3dist.config import ModelSettings, OptimizerSettings
from i3dist.data.lanes import Batch
from i3dist.model.compressor_kinds import COMPRESSORS
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.ops.cross_entropy import IGNORE
from i3dist.tracking.mfu import per_token
from tests.conftest import ROOT, program

# As for a program started in that folder.
sys.path.append(str(ROOT / "benchmarks"))

import flops
import results
import synthetic
import train_throughput
from bare_loop import BareLoop
from gpt import GPT, document_mask
from i3_steps import WithoutHistory, scripted_wkv

CPU = torch.device("cpu")
TOY = train_throughput.TOY.model
UPPER = TOY.layer_kinds.count("dual-attention")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> synthetic.Data:
    folder = tmp_path_factory.mktemp("data")
    return synthetic.Data.write(folder, TOY.vocab, TOY.chunk_length, 8, 64)


@pytest.fixture(scope="module")
def batch(data: synthetic.Data) -> Batch:
    return synthetic.batches(data.lane_windows(4, 8), 1, CPU)[0]


def small_gpt() -> GPT:
    torch.manual_seed(0)
    return GPT(128, vocab=64, layers=2, width=32, heads=4, feed_forward=128)


def i3(kind: type[I3LM] = I3LM, compressor: str = "records") -> I3LM:
    torch.manual_seed(0)
    return kind(TOY.model_copy(update={"compressor": compressor}), synthetic.BOS)


def losses(model: I3LM, batch: Batch, gate: float = 1.0) -> Tensor:
    state = LaneState.empty(len(batch.tokens), TOY, CPU, torch.float32)
    return model(*batch, state, torch.tensor(gate))[0]


def test_the_opponent_has_as_many_parameters() -> None:
    with torch.device("meta"):
        models = [I3LM(ModelSettings(vocab_size=32_000), 2), GPT(4096)]
    ours, theirs = (sum(p.numel() for p in model.parameters()) for model in models)
    assert ours == 340_305_690
    assert theirs == 339_522_560
    assert theirs == pytest.approx(ours, rel=0.0025)


def test_documents_are_as_long_as_they_should_be(tmp_path: Path) -> None:
    data = synthetic.Data.write(tmp_path, 1000, 512, 2, 256)
    assert data.manifest.tokens / data.manifest.documents == pytest.approx(1030, rel=0.2)
    assert (data.stream[1:][data.stream[:-1] == synthetic.EOS] == synthetic.BOS).all()


def test_rows_predict_the_next_token_but_no_beginning(data: synthetic.Data) -> None:
    tokens, targets = data.rows(4, 128)
    following = tokens.flatten()[1:]
    wanted = torch.where(following == synthetic.BOS, IGNORE, following)
    assert targets.flatten()[:-1].equal(wanted)


def test_flops_of_the_gpt(data: synthetic.Data) -> None:
    """Weights against the products that PyTorch counts; attention against the mask."""
    model, (tokens, targets) = small_gpt(), data.rows(4, 128)
    with FlopCounterMode(display=False) as counter:
        model(tokens, targets)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    causal = flops.of_gpt(model, tokens, None)
    assert counted == 2 * causal.weights * tokens.numel()
    assert causal.attention == 2 * 32 * 129 / 2
    assert causal.flops == 6 * causal.weights + 12 * causal.attention
    seen = document_mask(tokens, synthetic.BOS).sum() / tokens.numel()
    assert flops.of_gpt(model, tokens, synthetic.BOS).attention == pytest.approx(
        2 * 32 * float(seen)
    )


@pytest.mark.parametrize("kind", ["attention", "dual-attention"])
@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_flops_of_the_i3(batch: Batch, compressor: str, kind: str) -> None:
    torch.manual_seed(0)
    sizes = TOY.model_copy(update={"compressor": compressor, "layers": f"2xrwkv,{UPPER}x{kind}"})
    model, d = I3LM(sizes, synthetic.BOS, alignment=1), TOY.d_model
    with FlopCounterMode(display=False) as counter:
        losses(model, batch)
    counted = counter.get_flop_counts()["Global"][torch.ops.aten.mm]
    tokens, window = batch.tokens.numel(), batch.tokens.shape[1]
    # Channels of ages that no weight is stored for: of output, keys and values.
    keys = 1 + TOY.latents / TOY.chunk_length * (TOY.history_chunks + window) / window
    ages = UPPER * TOY.heads * TOY.history_chunks * d
    spare = ages * tokens * (1 + 2 * keys)
    # Once: keys and values of slots; the product that projects sub-latents, or learned queries.
    literal = compressor == "literal"
    rows = (0 if literal else d / model.compressor.sub_latents) + model.keys_per_chunk
    once = UPPER * 2 * (d + TOY.heads * TOY.history_chunks) * d * rows
    once += TOY.latents * d * d if literal else 0
    weights = per_token(model, batch).weights * tokens
    assert counted == pytest.approx(2 * (weights + spare + once))


@pytest.mark.parametrize("compressor", COMPRESSORS)
def test_keys_that_the_i3_sees(compressor: str) -> None:
    """A chunk of [rest of a document, whole document], with two chunks of history."""
    tokens = torch.full((1, 1, 16), 20)
    tokens[0, 0, 10] = synthetic.BOS
    batch = Batch(tokens, tokens, torch.tensor([[2]]))
    own = (sum(range(1, 11)) + sum(range(1, 7))) / 16
    model = i3(compressor=compressor)
    past = 2 * model.keys_per_chunk * 10 / 16
    read = TOY.latents * 6 / 16  # the compressor reads the last document
    wanted = TOY.d_model * (UPPER * (own + past) + read)
    assert per_token(model, batch).attention == pytest.approx(wanted)
    without = per_token(i3(WithoutHistory), batch).attention
    assert without == pytest.approx(TOY.d_model * UPPER * own)


def test_the_bare_loop_is_adamw_with_clipping() -> None:
    """Against PyTorch's own parts in fp32, over two micro-batches."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8))
    # A large eps keeps AdamW from turning the rounding of small gradients into whole steps.
    settings, x = OptimizerSettings(lr=0.01, eps=0.1), torch.randn(2, 4, 8)
    plain = nn.Sequential(nn.Linear(8, 8, bias=False), nn.LayerNorm(8))
    plain.load_state_dict(model.state_dict())
    groups = [{"params": plain[0].parameters()}, {"params": plain[1].parameters()}]
    groups[1]["weight_decay"] = 0.0
    adamw = torch.optim.AdamW(
        groups, settings.lr, (settings.beta1, settings.beta2), settings.eps, settings.weight_decay
    )
    loop = BareLoop(model, settings, clip=0.5)
    for _ in range(3):
        for part in x:
            loop.backward(loop(part.bfloat16())[:, 0].sum(), torch.tensor(8))
        norm = loop.step(settings.lr)
        adamw.zero_grad()
        (plain(x)[..., 0].sum() / 8).backward()
        reference = nn.utils.clip_grad_norm_(plain.parameters(), 0.5)
        adamw.step()
        assert float(norm) == pytest.approx(float(reference), rel=0.02)
    for master, wanted, low in zip(loop.masters, plain.parameters(), loop.parameters, strict=True):
        torch.testing.assert_close(master, wanted.detach(), rtol=1e-3, atol=1e-4)
        assert low.equal(master.bfloat16())


def test_without_history_is_a_closed_gate(batch: Batch) -> None:
    ours, other = i3(), i3(WithoutHistory)
    weights = {n.replace("dual-attention.", "attention."): p for n, p in ours.state_dict().items()}
    missing, _ = other.load_state_dict(weights, strict=False)
    assert missing == []
    torch.testing.assert_close(losses(other, batch), losses(ours, batch, gate=0.0))


def test_the_scripted_loop_is_the_same_function(batch: Batch) -> None:
    model = i3()
    ours = losses(model, batch)
    with scripted_wkv():
        torch.testing.assert_close(losses(model, batch), ours)


def test_masks_keep_documents_of_a_row_apart(data: synthetic.Data) -> None:
    model, (tokens, targets) = small_gpt(), data.rows(1, 128)
    mask = document_mask(tokens, synthetic.BOS)
    second = int((tokens[0] == synthetic.BOS).nonzero()[1])
    other = tokens.clone()
    other[0, 1:second] = 20
    before, after = (model(t, targets, mask)[0] for t in (tokens, other))
    assert after[second:].equal(before[second:])
    assert not model(other, targets)[0, second:].equal(model(tokens, targets)[0, second:])


def row(contestant: str, shape: str, ms: float, **changes: float) -> results.Row:
    return results.Row(contestant, shape, 1, 1000, ms, 2.0, 1e4, None, 2.0, 1.0, **changes)


def test_figures_take_the_fastest_opponents() -> None:
    rows = [
        row("engine", "card", 4.0),
        row("engine", "best", 2.0),
        row("no-history", "best", 1.9),
        row("bare", "best", 1.9),
        row("bare", "card", 2.0),
        row("gpt-4096", "8 rows", 4.0),
        row("gpt-4096", "16 rows", 3.0),
        row("gpt-4096-masks", "8 rows", 2.5),
        row("gpt-512", "8 rows, ff 4096", 2.5),  # of another size
        row("data", "best", 2.0, data_wait=0.02),
    ]
    found = {figure.name: figure for figure in results.figures(rows, "card")}
    values = {name: figure.value for name, figure in found.items()}
    assert values["engine, best shape, tokens/s"] == 500_000
    assert values["engine, best shape, of the best product"] == pytest.approx(100)
    assert "engine, best shape, MFU" not in values, "the device has no data sheet"
    known = results.figures([row("engine", "best", 2.0, sheet=2e4)], "card")
    assert {f.name: f.value for f in known}["engine, best shape, MFU"] == pytest.approx(50)
    assert values["engine / fastest GPT at 4,096"] == pytest.approx(1.25)
    assert values["engine / bare loop, same shape"] == pytest.approx(0.95)
    assert values["card's step / best shape"] == pytest.approx(0.5)
    assert values["time that history adds"] == pytest.approx(2.0 / 1.9 - 1)
    met = {name: figure.met for name, figure in found.items()}
    assert met["engine, best shape, tokens/s"] is True
    assert met["engine / fastest GPT at 4,096"] is False
    assert met["waiting for data"] is False
    assert "engine / fastest GPT at 512" not in found


def test_parts_of_a_run_are_joined_in_one_file(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    words = ["--toy", "--json", str(path), "--steps", "2", "--warm-up", "1", "--shapes", "4"]
    rows = ["--gpt-512", "4", "--gpt-4096", "2"]
    train_throughput.main([*words, *rows, "--only", "gpt-512", "gpt-4096-masks", "scripted"])
    former = ["--attention", "attention"]
    train_throughput.main([*words, *rows, *former, "--only", "gpt-512", "bare"])
    train_throughput.main([*words, *rows, "--only", "gpt-512", "--gpt-ff", "128"])
    record = json.loads(path.read_text())
    names = [row["contestant"] for row in record["rows"]]
    assert names == ["bare", "gpt-512", "gpt-512", "gpt-4096-masks", "scripted"]
    former_model = I3LM(TOY.model_copy(update={"layers": f"2xrwkv,{UPPER}xattention"}), 2)
    bare, usual, narrow = (row["parameters"] for row in record["rows"][:3])
    assert bare == sum(p.numel() for p in former_model.parameters())
    assert usual - narrow == 2 * 2 * 64 * 128
    assert record["figures"] == []
    assert all(row["last_loss"] < row["first_loss"] for row in record["rows"])


def test_the_engine_takes_part(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    words = ["--toy", "--json", path, "--steps", "2", "--warm-up", "1", "--shapes", "8x4"]
    result = program(
        "benchmarks/train_throughput.py", *words, "--only", "engine", "no-history", "data"
    )
    assert result.returncode == 0, result.stderr
    names = {figure["name"] for figure in json.loads(path.read_text())["figures"]}
    assert {"time that history adds", "waiting for data"} <= names
