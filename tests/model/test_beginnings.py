"""What weights begin as, written anew from the papers and the reference code of RWKV-4."""

import math

import pytest
import torch

from i3dist.config import ModelSettings
from i3dist.model.lm import I3LM

WIDTH, LAYERS = 60, 3


@pytest.fixture(scope="module")
def model() -> I3LM:
    torch.manual_seed(0)
    settings = ModelSettings(
        vocab_size=500, d_model=WIDTH, layers=f"{LAYERS}xrwkv,1xattention", heads=4, latents=8
    )
    return I3LM(settings, bos_id=2)


@pytest.mark.parametrize("layer", range(LAYERS))
def test_decays_bonuses_and_mixes_are_those_of_the_reference(model: I3LM, layer: int) -> None:
    rises, falls = layer / (LAYERS - 1), 1 - layer / LAYERS
    time, channel = model.rwkv[layer].time_mix, model.rwkv[layer].channel_mix
    for i in range(WIDTH):
        share = i / WIDTH
        wanted = {
            "decay": -5 + 8 * (i / (WIDTH - 1)) ** (0.7 + 1.3 * rises),
            "bonus": math.log(0.3) + 0.5 * ((i + 1) % 3 - 1),
            "time-mix key": share**falls,
            "time-mix value": share**falls + 0.3 * rises,
            "time-mix receptance": share ** (0.5 * falls),
            "channel-mix key": share**falls,
            "channel-mix receptance": share**falls,
        }
        found = {
            "decay": time.decay_base[i] + time.decay_offset[i],
            "bonus": time.bonus_base[i] + time.bonus_offset[i],
            "time-mix key": time.mix_key[i],
            "time-mix value": time.mix_value[i],
            "time-mix receptance": time.mix_receptance[i],
            "channel-mix key": channel.mix_key[i],
            "channel-mix receptance": channel.mix_receptance[i],
        }
        assert {name: value.item() for name, value in found.items()} == pytest.approx(
            wanted, rel=1e-5, abs=1e-6
        )


def test_one_layer_begins_as_the_first_of_many() -> None:
    one = I3LM(
        ModelSettings(vocab_size=20, d_model=8, layers="1xrwkv,2xattention", latents=2), bos_id=2
    )
    decay = one.rwkv[0].time_mix.decay_base.tolist()
    assert decay == pytest.approx([-5 + 8 * (i / 7) ** 0.7 for i in range(8)], abs=1e-5)


def test_matrices_begin_with_the_deviation_of_their_width_and_depth(model: I3LM) -> None:
    """sqrt(2 / 5D); of those that end a residual branch by the root of their number less."""
    small = math.sqrt(2 / (5 * WIDTH))
    ends = small / math.sqrt(2 * (LAYERS + 1))
    wanted = {
        "embedding.weight": small,
        "head.weight": small,
        "rwkv.1.time_mix.key.weight": small,
        "rwkv.1.channel_mix.key.weight": small,
        "attention.0.ff.up.weight": small,
        "rwkv.1.time_mix.output.weight": ends,
        "rwkv.1.channel_mix.value.weight": ends,
        "attention.0.attention.output.weight": ends,
        "attention.0.ff.down.weight": ends,
    }
    parameters = dict(model.named_parameters())
    for name, deviation in wanted.items():
        assert parameters[name].std().item() == pytest.approx(deviation, rel=0.08), name
        assert abs(parameters[name].mean().item()) < 0.1 * deviation, name


def test_norms_begin_as_the_identity(model: I3LM) -> None:
    norms = {name: p for name, p in model.named_parameters() if "norm" in name}
    assert len(norms) == 2 * (2 * LAYERS + 2 + 2 + 3)
    for name, parameter in norms.items():
        assert parameter.eq(1 if name.endswith("weight") else 0).all(), name
