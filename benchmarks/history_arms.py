"""The arms of benchmarks/history.py: i3-4096ctx, or with something else for its history.

  none        no history
  recipe      the library's default: latents of records
  recordsR    with R records in a latent
  literal     the card read literally: learned queries read the whole chunk
  mean        means of the spans, normalised: no compressor
  picks       4:1, tokens of full width: a fourth of the chunk's
  every       4:1, a record of D/4 for every token
  ceiling     no compression: every token of the last 4,096
  carry       no history, RWKV state carried from chunk to chunk

and added to these

  -low        the logit of history begins low; otherwise literal and ceiling begin with it open
  -open       it begins open; otherwise the others begin low
  -scaled     it begins where all of history weighs as much as 16 of the chunk's tokens
  -keen       salience learns eight times as fast
  -even       records choose tokens by no salience
  -top        each record is one token, the most salient of the chunk
  -pick       each record is one token, the most salient of the latent's span
  -zero       records begin as nothing to attention
  -apart      the records of a latent have projections of their own
  -own        history has key and value projections of its own in every attention block
  -tail       half of the latents hold the chunk's last tokens
  -drop       a tenth of the chunks is trained without history
  -late       history is off for the first 1,000 steps instead of 100
  -carry      RWKV state carried
  -plain      no feed-forward refines latents
  -each       one feed-forward refines records, each by itself
  -alone      and one norm
  -early      the compressor reads half of the RWKV blocks only
  -lower      the lower attention block alone sees history
  -upper      the upper one alone does
  -match      records are trained besides to give keys and values as tokens do
  -match1     the same with ten times the weight
  -mirror     records are trained besides to give tokens back
  -still      the compressor learns, and hands no gradient down to the RWKV stack
  -detached   what makes latents is left as it began
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from compressors import (
    Anchored,
    Apart,
    Detached,
    Each,
    Even,
    Keen,
    Literal,
    MeanPool,
    Nothing,
    Tail,
    Top,
    TopAlone,
    TopOfSpan,
    Uncompressed,
)
from i3_steps import WithoutHistory
from torch import Tensor, nn

from i3dist.config import CompressionSettings, ModelSettings
from i3dist.errors import UserError
from i3dist.model.attention import CLOSED, Attention, Slots
from i3dist.model.compress import Compressor
from i3dist.model.layers import Channels, Linear
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.ops.attention import KeysValues
from i3dist.ops.precision import linear

PLAIN = ("none", "recipe", "literal", "mean", "picks", "every", "ceiling", "carry")
WITHOUT_RECORDS = ("none", "literal", "mean", "ceiling", "carry")
BLOCKS = ("lower", "upper")  # of attention
MIRRORS = {"mirror": 0.1, "match": 0.1, "match1": 1.0}
ADDED = (
    *("low", "open", "scaled", "even", "keen", "apart", "own", "tail", "drop", "carry"),
    *("late", "top", "topalone", "anchor", "pick", "zero", "each", "alone", "plain", "early"),
    *(*BLOCKS, *MIRRORS, "still", "detached"),
)
ARMS = [
    *("none", "records4", "literal", "mean", "ceiling", "carry", "records4-carry"),
    *("records4-detached", "records4-open", "records4-scaled", "records4-even", "records4-apart"),
    *("records4-own", "records4-tail", "records4-drop", "records4-plain", "records4-early"),
    *("records4-lower", "records4-upper", "records4-still", "recipe", "records2", "records8"),
    *("picks", "every", "ceiling-low", "literal-low"),
]
SCALED = 16  # tokens
SHUT = -1e4  # a logit of history with which no query sees it, and which gets no gradient


class OwnProjections(Attention):
    """Attention that projects history by matrices of their own, which begin as those of tokens."""

    def __init__(self, width: Channels, heads: int, chunks: int):
        super().__init__(width, heads, chunks)
        self.of_history = Linear(width, self.key_value.d_out)

    def begin(self) -> None:
        """Begin with the tokens' projections."""
        super().begin()
        self.of_history.weight.copy_(self.key_value.weight)

    def history(self, latents: Tensor) -> KeysValues:
        """As `Attention.history`."""
        tokens, self.key_value = self.key_value, self.of_history
        try:
            return super().history(latents)
        finally:
            self.key_value = tokens


@dataclass(frozen=True)
class Arm:
    """One arm, read from its name."""

    base: str
    added: frozenset[str]

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Read "records8-tail-drop"."""
        base, *added = name.split("-")
        if not (base in PLAIN or re.fullmatch(r"records\d+", base)):
            raise UserError(f"there is no arm {base!r}; there are {', '.join(PLAIN)}, recordsR")
        if wrong := [more for more in added if more not in ADDED]:
            raise UserError(f"{name}: {wrong[0]!r} is none of {', '.join(ADDED)}")
        if base in WITHOUT_RECORDS and (wrong := [more for more in added if more in MIRRORS]):
            raise UserError(f"{name}: {base} has no records for {wrong[0]!r} to train")
        return cls(base, frozenset(added))

    @property
    def has_history(self) -> bool:
        """Whether there are latents."""
        return self.base not in ("none", "carry")

    @property
    def gate(self) -> CompressionSettings:
        """When history enters training."""
        late = {"off_steps": 1000} if "late" in self.added else {}
        return CompressionSettings(**late)

    @property
    def mirror(self) -> float:
        """Weight of the mirror's loss."""
        return next((weight for name, weight in MIRRORS.items() if name in self.added), 0.0)

    def bias(self, block: str, keys: int) -> float:
        """What the logit of history begins at in one of `BLOCKS`, where it has so many keys."""
        if block not in (self.added.intersection(BLOCKS) or BLOCKS):
            return SHUT
        if "scaled" in self.added:
            return math.log(SCALED / keys)
        opened = self.base in ("literal", "ceiling")
        return 0.0 if "open" in self.added or (opened and "low" not in self.added) else CLOSED

    def settings(self, card: ModelSettings) -> ModelSettings:
        """The model's."""
        length, carries = card.chunk_length, "carry" in (self.base, *self.added)
        changes: dict[str, object] = {"state_carry": carries}
        match self.base:
            case "ceiling":
                changes["latents"] = length
            case "picks":
                changes |= {"latents": length // 4, "records": 1}
            case "every":
                changes |= {"latents": length // 4, "records": 4}
            case base if base.startswith("records"):
                changes["records"] = int(base.removeprefix("records"))
        return card.model_copy(update=changes)

    def compressor(self, width: Channels, s: ModelSettings) -> nn.Module:
        """What makes latents."""
        match self.base:
            case "ceiling":
                made: nn.Module = Uncompressed(width)
            case "mean":
                made = MeanPool(width, s.latents)
            case "literal":
                made = Literal(width, s.heads, s.ff_mult, s.latents)
            case _:
                kinds: dict[str, Callable[..., Compressor]] = {
                    "tail": partial(Tail, length=s.chunk_length),
                    "apart": Apart,
                    "each": partial(Each, alone=False),
                    "alone": partial(Each, alone=True),
                    "top": Top,
                    "anchor": Anchored,
                    "topalone": TopAlone,
                    "pick": TopOfSpan,
                }
                kind = next((kinds[more] for more in self.added if more in kinds), Compressor)
                made = kind(width, s.ff_mult, s.latents, s.records)
                if "even" in self.added:
                    made.salience = Even(width, made.salience.d_out)
                if "keen" in self.added:
                    made.salience = Keen(width, made.salience.d_out)
                if "zero" in self.added:
                    made.begin = partial(begin_at_zero, made, made.begin)
                if "plain" in self.added:
                    made.ff = Nothing()
        if "still" in self.added:
            made.register_forward_pre_hook(lambda _, given: (given[0].detach(), given[1]))
        return Detached(made) if "detached" in self.added else made


class Mirrored(I3LM):
    """Trained besides to make of a token's record the token again, as attention reads it.

    The error is of keys and values of all attention blocks, as a share of their size, so that a
    record holds what attention asks for: the best approximation of low rank. It teaches the
    compressor's two projections and nothing else.
    """

    weight: float  # against the loss of the language model
    raw: bool  # whether the error is of the tokens themselves, instead
    every = 8  # one token of so many

    def forward(
        self, tokens: Tensor, targets: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        """As `I3LM.forward`; losses are larger by that of the mirror."""
        below, after = self.below(tokens, depth, state)
        losses = self.losses(self.above(below, gate), targets)
        return losses + self.weight * self.mirror(below.x), after

    def mirror(self, x: Tensor) -> Tensor:
        """Error of chunks as a share: x [B, K, T, D] -> [B, K, 1] fp32."""
        c = self.compressor
        normed = c.norm_in(x[..., self.every - 1 :: self.every, :].detach()).detach()
        record = c.part.trim(c.record(normed))
        record = record * record.float().square().mean(-1, keepdim=True).rsqrt().to(record.dtype)
        missed = c.token(c.part.pad(record)) - normed
        if self.raw:
            return self.width.trim(missed).float().square().mean((-2, -1)).unsqueeze(-1)
        weights = [
            p.computed(p.weight.detach()) for p in (b.attention.key_value for b in self.attention)
        ]
        errors, sizes = (
            sum(linear(y, weight).float().square().mean((-2, -1)) for weight in weights)
            for y in (missed, normed)
        )
        return (errors / sizes).unsqueeze(-1)


def named_arm(name: str) -> str:
    """The name, if there is such an arm: a type for argparse."""
    Arm.parse(name)
    return name


def begin_at_zero(made: Compressor, begin: Callable[[], None]) -> None:
    """Have a compressor's records begin as nothing to attention."""
    begin()
    nn.init.zeros_(made.token.weight)


def read_halfway(model: I3LM) -> None:
    """Have the compressor read the residual stream after half of the RWKV blocks."""
    halfway: list[Tensor] = []

    def keep(_: nn.Module, given: object, out: tuple[Tensor, object]) -> None:
        halfway[:] = [out[0]]

    model.rwkv[len(model.rwkv) // 2 - 1].register_forward_hook(keep)
    model.compressor.register_forward_pre_hook(lambda _, given: (halfway.pop(), given[1]))


def replace_history(model: I3LM, arm: Arm) -> None:
    """Have history made and read as the arm does."""
    settings = model.settings
    model.compressor = arm.compressor(model.width, settings)  # type: ignore[assignment]
    model.slots = Slots(model.width, model.keys_per_chunk)
    if "early" in arm.added:
        read_halfway(model)
    keys = model.keys_per_chunk * settings.history_chunks
    for place, block in zip(BLOCKS, model.attention, strict=True):
        if "own" in arm.added:
            block.attention = OwnProjections(model.width, settings.heads, settings.history_chunks)
        nn.init.constant_(block.attention.age_bias, arm.bias(place, keys))


def build(name: str, settings: ModelSettings, bos_id: int, seed: int) -> I3LM:
    """The model of an arm. What arms of a seed have in common begins with the same weights, up to
    the first part that differs in shape."""
    arm = Arm.parse(name)
    settings = arm.settings(settings)
    kind = I3LM if arm.has_history else WithoutHistory
    model = (Mirrored if arm.mirror else kind)(settings, bos_id)
    if isinstance(model, Mirrored):
        model.weight, model.raw = arm.mirror, "mirror" in arm.added
    if arm.has_history:
        replace_history(model, arm)
    torch.manual_seed(seed)
    model.draw()
    return model
