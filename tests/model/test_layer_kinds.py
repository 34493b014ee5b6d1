"""Layer kinds: which stacks there are, and that each kind decodes as it trains. About 6 s."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from i3dist.checkpoint import writer
from i3dist.checkpoint.reader import read_lanes
from i3dist.config import CheckpointSettings, ModelSettings, Settings
from i3dist.distributed.job import Job
from i3dist.errors import UserError
from i3dist.inference.decoder import Decoder
from i3dist.model.layer_kinds import LAYER_KINDS, Stack
from i3dist.model.lm import I3LM, parameters_by_part
from i3dist.model.state import LaneState
from tests.checkpoint.test_format import JOB, state_of
from tests.conftest import environment, error_line, free_port, launcher, program
from tests.model.conftest import BOS, SMALL, build
from tests.model.kinds import Conv, Forgetful, Mlp
from tests.model.streams import depth_of, empty, hidden_states, logits, stream

BUILT_IN = list(LAYER_KINDS)
OURS = {"mlp": Mlp, "conv": Conv, "forgetful": Forgetful}
T = SMALL["chunk_length"]
MIXED = "1xconv,2xrwkv,1xmlp,2xconv,2xattention"


@pytest.fixture(autouse=True)
def kinds() -> Iterator[None]:
    LAYER_KINDS.update(OURS)
    yield
    for name in OURS:
        del LAYER_KINDS[name]


def stack_with(kind: str) -> str:
    """A small stack with two layers of a kind."""
    if LAYER_KINDS.of(kind).sees_history:
        return f"1xrwkv,2x{kind}"
    return f"2x{kind},1xattention" if kind == "rwkv" else f"1x{kind},1xrwkv,1x{kind},1xattention"


def test_every_kind_is_tested_here() -> None:
    tested = ["rwkv", "attention", "dual-attention"]
    assert tested == BUILT_IN, "add what this list lacks to the tests below"


@torch.no_grad()
def decoding_gap(layers: str, carry: bool, prompt: int, mean_document: float) -> float:
    """How far the decoder's logits are from those of the training forward, at most."""
    model = build(layers=layers, state_carry=carry)
    tokens = stream(1, 5, T, SMALL["vocab_size"], mean_document)
    expected = logits(model, tokens).flatten(0, 2)
    decoder, flat = Decoder(model), tokens.flatten()
    got = [decoder.feed(flat[:prompt]), *(decoder.feed(t[None]) for t in flat[prompt:])]
    return float((torch.stack(got).double() - expected[prompt - 1 :]).abs().max())


@pytest.mark.parametrize("layers", [*map(stack_with, BUILT_IN), "1xmlp,2xattention", MIXED])
@pytest.mark.parametrize("carry", [False, True])
@pytest.mark.parametrize(("prompt", "mean_document"), [(1, 15), (2 * T + 3, 1e9)])
def test_decoding_equals_the_training_forward(
    kinds: None, layers: str, carry: bool, prompt: int, mean_document: float
) -> None:
    assert decoding_gap(layers, carry, prompt, mean_document) < 1e-5


@pytest.mark.parametrize("carry", [False, True])
def test_a_kind_that_hands_on_no_state_is_found_out(carry: bool) -> None:
    assert decoding_gap("1xrwkv,1xforgetful,1xattention", carry, 2 * T + 3, 1e9) > 1e-3


@pytest.mark.parametrize("layers", [MIXED, "2xmlp,1xattention"])
@pytest.mark.parametrize("carry", [False, True])
@torch.no_grad()
def test_windows_one_by_one_equal_one_window(layers: str, carry: bool) -> None:
    model = build(layers=layers, state_carry=carry)
    tokens = stream(2, 6, T, SMALL["vocab_size"], 40)
    depth, state, gate = depth_of(tokens), empty(model), torch.tensor(0.7)
    whole, whole_state = hidden_states(model, tokens, depth, state, gate)
    parts = []
    for start in (0, 2, 4):
        part = slice(start, start + 2)
        hidden, state = hidden_states(model, tokens[:, part], depth[:, part], state, gate)
        parts.append(hidden)
    torch.testing.assert_close(torch.cat(parts, dim=1), whole)
    for name, tensor in whole_state.tensors().items():
        torch.testing.assert_close(state.tensors()[name], tensor)


def test_parameters_are_numbered_by_kind() -> None:
    with torch.device("meta"):
        model = I3LM(ModelSettings.model_validate(SMALL | {"layers": MIXED}), BOS)
    tops = dict.fromkeys(".".join(n.split(".")[:2]) for n, _ in model.named_parameters())
    blocks = ["conv.0", "conv.1", "conv.2", "rwkv.0", "rwkv.1", "mlp.0"]
    assert [top for top in tops if top[-1].isdigit()] == [*blocks, "attention.0", "attention.1"]
    assert [type(block) for block in model.lower[3:]] == [Mlp, Conv, Conv]
    assert [block is model.conv[i] for i, block in enumerate(model.lower[4:], 1)] == [True, True]
    parts = parameters_by_part(model)
    assert list(parts)[-1] == "norms" and {"conv", "rwkv", "mlp", "attention"} < set(parts)
    assert sum(parts.values()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("kind", ["attention", "dual-attention"])
def test_the_stacks_of_runs_have_the_names_that_they_always_had(kind: str) -> None:
    """Of the default, and of the former one."""
    settings = ModelSettings(layers=f"12xrwkv,2x{kind}")
    assert settings == ModelSettings() or kind == "attention"
    with torch.device("meta"):
        names = {name for name, _ in I3LM(settings, BOS).named_parameters()}
    assert {f"rwkv.{i}.time_mix.key.weight" for i in range(12)} < names
    assert {f"{kind}.{i}.attention.query.weight" for i in range(2)} < names
    assert {"compressor.salience.weight", "compressor.record.weight"} < names


def test_the_state_of_every_kind_is_saved(tmp_path: Path) -> None:
    model = ModelSettings.model_validate(SMALL | {"layers": MIXED, "state_carry": True})
    nothing = LaneState.empty(2, model, torch.device("cpu"), torch.float32)
    sizes = {name: tensor.shape[1] for name, tensor in nothing.tensors().items()}
    rwkv = {"wkv": 2, "time_shift": 2, "channel_shift": 2}
    assert sizes == {"latents": 3, "conv.one_back": 3, "conv.two_back": 3, **rwkv}
    lanes = nothing.map(torch.randn_like)
    written = writer.save(
        tmp_path, JOB, state_of(1), [], (range(2), lanes), CheckpointSettings(), b"{}"
    )
    read = read_lanes(written, range(2), nothing)
    assert all(read.tensors()[name].equal(tensor) for name, tensor in lanes.tensors().items())
    assert list(read.tensors()) == list(lanes.tensors())
    with pytest.raises(UserError, match=r"no tensor named '[01]/(conv|wkv|time|channel)"):
        read_lanes(written, range(2), LaneState(nothing.latents, {}))


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        ("1xrwkv,1xlinear", "model.layers=1xrwkv,1xlinear: unknown layer kind 'linear': use"),
        ("1xattention,1xrwkv", "rwkv stands above attention, which sees history"),
        ("1xrwkv,1xattention,1xconv,1xattention", "conv stands above attention"),
        ("3xattention", "has no layer for the compressor to read"),
        ("1xrwkv,1xmlp", "has no layer that sees history"),
    ],
)
def test_a_stack_that_cannot_be_is_refused_in_one_line(layers: str, says: str) -> None:
    settings = Settings().with_values(**{"model.layers": layers}).model
    for build_it in (Stack.of, lambda sizes: I3LM(sizes, BOS)):
        with pytest.raises(UserError, match=says) as refused:
            build_it(settings)
        assert "\n" not in str(refused.value)
        assert str(refused.value).count("--extend") <= 1, "a remedy once"


def test_a_kind_that_cannot_be_in_a_file_is_named_with_its_line(tmp_path: Path) -> None:
    for line in ("model: {layers: '1xattention,1xrwkv'}", "model: {layers: '1xlinear'}"):
        file = tmp_path / "my.yaml"
        file.write_text(f"\n{line}\n")
        settings = Settings.load(file)
        with pytest.raises(UserError, match=f"^{file}, line 2: setting model.layers=1x"):
            Stack.of(settings.model, settings.place_of("model.layers"))
        line = error_line(program("launch/train.py", "--dry-run", "--config", file))
        assert f"{file}, line 2: " in line
    file.write_text("optimizer: {kind: sgd}\n")
    line = error_line(program("launch/train.py", "--dry-run", "--config", file))
    assert f"{file}, line 1: unknown optimizer.kind 'sgd'" in line


def test_training_refuses_such_a_stack_before_ranks_wait(data: Path, tmp_path: Path) -> None:
    """One rank of two, whose peer never comes."""
    environ = environment() | {"TORCHELASTIC_RUN_ID": "tests"}
    Job(0, 2, 0, 2, "127.0.0.1", free_port(), "torchrun").export(environ)
    run, words = tmp_path / "run", ["--config", "configs/tiny.yaml", "train.device=cpu"]
    words += ["model.layers=1xattention,1xrwkv", f"data.path={data}", f"run.path={run}"]
    result = launcher().run(["launch/train.py", *words], [environ], 60)
    assert result.returncode == 1 and not run.exists()
    assert result.stderr.strip().splitlines()[-1].startswith("error: setting model.layers=1xatt")
    assert "Traceback" not in result.stderr


@pytest.mark.parametrize("name", ["compressor", "head", "forward", "lower", "norms", "embedding"])
def test_a_kind_cannot_have_the_name_of_another_part(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(LAYER_KINDS, name, Mlp)
    sizes = SMALL | {"layers": f"1x{name},1xattention"}
    with pytest.raises(UserError, match=f"uses the name '{name}'"):
        I3LM(ModelSettings.model_validate(sizes), BOS)
