"""The RWKV stack against another implementation of RWKV-4, transformers', with the same weights."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from transformers import RwkvConfig, RwkvModel

from i3dist.config import ModelSettings
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from tests.model.conftest import BOS, SMALL
from tests.model.streams import depth_of, empty, stream

CLOSE = 2e-6
WIDTH, LAYERS, LENGTH = SMALL["d_model"], 3, SMALL["chunk_length"]

# Their names of our parameters; a block's stand behind "blocks.N." and "rwkv.N.".
OUTSIDE = {
    "embeddings.weight": "embedding.weight",
    "blocks.0.pre_ln": "norm_in",
    "ln_out": "norm_out",
}
BLOCK = {
    "ln1": "norm_time",
    "ln2": "norm_channel",
    "attention.time_mix_key": "time_mix.mix_key",
    "attention.time_mix_value": "time_mix.mix_value",
    "attention.time_mix_receptance": "time_mix.mix_receptance",
    "attention.key.weight": "time_mix.key.weight",
    "attention.value.weight": "time_mix.value.weight",
    "attention.receptance.weight": "time_mix.receptance.weight",
    "attention.output.weight": "time_mix.output.weight",
    "feed_forward.time_mix_key": "channel_mix.mix_key",
    "feed_forward.time_mix_receptance": "channel_mix.mix_receptance",
    "feed_forward.key.weight": "channel_mix.key.weight",
    "feed_forward.value.weight": "channel_mix.value.weight",
    "feed_forward.receptance.weight": "channel_mix.receptance.weight",
}


def weights_for_theirs(model: I3LM) -> dict[str, Tensor]:
    """Our parameters of embedding, RWKV blocks and final norm, in their names."""
    ours, theirs = model.state_dict(), {}
    pairs = dict(OUTSIDE)
    for n, block in enumerate(model.rwkv):
        pairs |= {f"blocks.{n}.{their}": f"rwkv.{n}.{our}" for their, our in BLOCK.items()}
        mix = block.time_mix
        theirs[f"blocks.{n}.attention.time_decay"] = mix.decay_base + mix.decay_offset
        theirs[f"blocks.{n}.attention.time_first"] = mix.bonus_base + mix.bonus_offset
    for their, our in pairs.items():
        if our in ours:
            theirs[their] = ours[our]
        else:  # a norm
            theirs |= {f"{their}.{part}": ours[f"{our}.{part}"] for part in ("weight", "bias")}
    return {name: x.view(1, 1, -1) if "time_mix" in name else x for name, x in theirs.items()}


@torch.no_grad()
def pair(seed: int) -> tuple[I3LM, RwkvModel]:
    """Both models with the same random weights, none of which is left as it begins."""
    sizes = SMALL | {"layers": f"{LAYERS}xrwkv,2xattention", "state_carry": True}
    torch.manual_seed(seed)
    ours = I3LM(ModelSettings.model_validate(sizes), BOS).eval()
    for name, parameter in ours.named_parameters():
        if parameter.ndim >= 2:
            parameter.normal_(std=0.1)
        elif "mix_" in name:
            parameter.uniform_()
        else:  # norms, decays and bonuses: around what they begin as
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    config = RwkvConfig(
        vocab_size=SMALL["vocab_size"],
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        rescale_every=0,  # for fp16 only
    )
    theirs = RwkvModel(config).eval()
    theirs.load_state_dict(weights_for_theirs(ours))  # strict: all of theirs
    return ours, theirs


@torch.no_grad()
def read(model: I3LM, tokens: Tensor, depth: Tensor, state: LaneState) -> tuple[Tensor, LaneState]:
    """The stack's output [B, K * T, D], after the final norm, and the lanes' state."""
    below, state = model.below(tokens, depth, state)
    return model.width.trim(model.norm_out(below.x)).flatten(1, 2), state


def to_theirs(state: dict[str, Tensor]) -> list[Tensor]:
    """Our state in their form: both shifts, then a, b and m, [B, D, R] each."""
    parts = (state["channel_shift"], state["time_shift"], *state["wkv"].unbind(2))
    return [part.transpose(1, 2).clone() for part in parts]


def to_ours(state: list[Tensor]) -> dict[str, Tensor]:
    """The inverse."""
    channel_shift, time_shift, *wkv = (part.transpose(1, 2) for part in state)
    parts = (torch.stack(wkv, dim=2), time_shift, channel_shift)
    return dict(zip(("wkv", "time_shift", "channel_shift"), parts, strict=True))


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_documents_in_one_stream_are_what_a_stranger_gives_each_alone(seed: int) -> None:
    """In one window, and in two with the state passed on."""
    ours, theirs = pair(seed)
    tokens = stream(seed, 8, LENGTH, SMALL["vocab_size"], mean_document=15)
    depth, flat = depth_of(tokens), tokens.flatten()
    starts = [*(flat == BOS).nonzero().flatten().tolist(), len(flat)]
    assert len(starts) > 3 and int(depth.max()) > 0, "several documents, some over chunk ends"
    alone = [theirs(flat[None, start:end]).last_hidden_state for start, end in pairwise(starts)]
    wanted = torch.cat(alone, dim=1)

    whole, _ = read(ours, tokens, depth, empty(ours))
    first, state = read(ours, tokens[:, :5], depth[:, :5], empty(ours))
    second, _ = read(ours, tokens[:, 5:], depth[:, 5:], state)
    assert (whole - wanted).abs().max() <= CLOSE
    assert (torch.cat([first, second], dim=1) - wanted).abs().max() <= CLOSE


@pytest.mark.parametrize("seed", range(3))
@torch.no_grad()
def test_either_goes_on_from_the_others_state(seed: int) -> None:
    ours, theirs = pair(seed)
    tokens = stream(seed, 6, LENGTH, SMALL["vocab_size"], mean_document=1e9)
    depth, flat = depth_of(tokens), tokens.flatten(1)
    wanted = theirs(flat).last_hidden_state[:, 3 * LENGTH :]

    _, state = read(ours, tokens[:, :3], depth[:, :3], empty(ours))
    after_ours = theirs(flat[:, 3 * LENGTH :], state=to_theirs(state.layers)).last_hidden_state
    assert (after_ours - wanted).abs().max() <= CLOSE

    left = theirs(flat[:, : 3 * LENGTH], use_cache=True).state
    state = LaneState(state.latents, to_ours(left))
    after_theirs, _ = read(ours, tokens[:, 3:], depth[:, 3:], state)
    assert (after_theirs - wanted).abs().max() <= CLOSE


@torch.no_grad()
def test_each_weight_is_compared() -> None:
    """The comparison can fail: a change of any of our tensors shows."""
    ours, theirs = pair(0)
    tokens = stream(0, 2, LENGTH, SMALL["vocab_size"], mean_document=1e9)
    wanted = theirs(tokens.flatten(1)).last_hidden_state
    for name, parameter in ours.named_parameters():
        if not name.startswith(("embedding", "norm_in", "rwkv", "norm_out")):
            continue
        kept = parameter.clone()
        parameter.add_(torch.randn_like(parameter), alpha=0.01)
        found, _ = read(ours, tokens, depth_of(tokens), empty(ours))
        assert (found - wanted).abs().max() > 10 * CLOSE, name
        parameter.copy_(kept)
