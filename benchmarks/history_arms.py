"""The arms of benchmarks/history.py: variants of i3-4096ctx's history.

Every arm has two blocks of `attention`, with one softmax for the chunk and history, unless it says
-dual, whatever the settings' default is. The default is recipe-dual-soon-joins2000.

  none        no history
  recipe      latents of four sub-latents, for the tokens with the highest scores
  recordsR    with R sub-latents in a latent
  literal     the card read literally: learned queries read the whole chunk
  local       literal, but a query begins with its part of the chunk, and has logits of positions
  mean        means of the spans, normalised: no compressor
  picks       4:1, tokens of full width: the fourth of the chunk's with the highest scores
  every       4:1, a sub-latent of D/4 for every token
  ceiling     no compression: every token of the last 4,096
  carry       no history, RWKV state carried from chunk to chunk

Additions to these:

  -soon       history is on from step 100, as on the card, instead of 1,000; -fromN: from step N
  -carriesN   RWKV state carried, from step N on
  -dual       dual attention: a softmax for the chunk, and one for history
  -reserveN   of it: r begins at N instead of 0
  -shared     of it: sub-latents are unfolded by one matrix, for all layers, keys and values
  -taught     of it: queries, keys and values of tokens get their gradient from history as well
  -mixed      of it: what a head reads of its chunk gives way to what it reads of history
  -pulled     of it: logits of the chunk learn from the share that history is given
  -yields     of it: the same to a degree that is learned
  -joinsN     of it: becomes one softmax over 1,000 steps, from step N on
  -open       the logit of history starts at 0 instead of low
  -even       the last of every four tokens has a sub-latent, whatever its score
  -spans      the highest scores of each latent's span have its sub-latents
  -wise       the router has a hidden layer, and sees the token after each
  -alone      a sub-latent holds its token and nothing else: no cross-attention
  -each       one feed-forward refines sub-latents one by one
  -joint      one norm for all sub-latents of a latent
  -own        history has key and value projections of its own in every attention block
  -drop       a tenth of the chunks is trained without history
  -carry      RWKV state carried
  -early      the compressor reads half of the RWKV blocks only
  -lower      only the lower attention block sees history
  -upper      only the upper one does
  -match      sub-latents are also trained to give the keys and values that their tokens give
  -still      the compressor learns, but passes no gradient down to the RWKV blocks
  -detached   the compressor is not trained
"""

import re
from dataclasses import dataclass

import torch
from attentions import Mixed, OwnProjections, Pulled, Shared, Taught, Yields
from compressors import (
    Alone,
    Detached,
    Each,
    Even,
    Joint,
    LocalLiteral,
    MeanPool,
    Spans,
    Uncompressed,
    Wise,
)
from i3_steps import WithoutHistory
from torch import Tensor, nn

from i3dist.config import CompressionSettings, ModelSettings
from i3dist.errors import UserError
from i3dist.model.attention import INITIAL_AGE_LOGIT, Attention, Slots
from i3dist.model.block import LayerState
from i3dist.model.compressor_literal import LiteralCompressor
from i3dist.model.compressor_records import RecordsCompressor
from i3dist.model.layer_kinds import Stack
from i3dist.model.layers import Channels
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.ops.cross_entropy import IGNORE
from i3dist.ops.linear import linear

PLAIN = ("none", "recipe", "literal", "local", "mean", "picks", "every", "ceiling", "carry")
WITHOUT_SUB_LATENTS = ("none", "literal", "local", "mean", "ceiling", "carry")
COMPRESSORS = {
    "even": Even,
    "spans": Spans,
    "alone": Alone,
    "each": Each,
    "joint": Joint,
    "wise": Wise,
}
BLOCKS = ("lower", "upper")  # of attention
WITH_NUMBER = ("from", "reserve", "carries", "joins")
OF_DUAL = ("taught", "mixed", "pulled", "yields", "joins", "shared", "reserve")
ALTERNATIVES = (
    tuple(COMPRESSORS),
    ("dual", "own"),
    ("soon", "from"),
    BLOCKS,
    *(("match", other) for other in ("detached", "early", "own", "joint", "dual")),
    ("carry", "carries", "match"),
    ("mixed", "yields"),
    *(("joins", other) for other in ("taught", "mixed", "pulled", "yields", "shared")),
    *(("early", other) for other in ("still", "carry")),
)
OF_SUB_LATENTS = ("match", "shared", *COMPRESSORS)
OF_HISTORY = (
    *("open", "own", "dual", "drop", "early", "still", "detached", "from"),
    *dict.fromkeys((*BLOCKS, *OF_SUB_LATENTS, *OF_DUAL)),
)
ADDED = ("soon", "carry", "carries", *OF_HISTORY)
ARMS = [
    *("none", "recipe", "literal", "local", "mean", "ceiling", "carry"),
    *(f"recipe-{added}" for added in ADDED if added not in (*OF_DUAL, *WITH_NUMBER)),
    *("recipe-from500", "recipe-dual-taught", "recipe-dual-mixed", "recipe-dual-taught-mixed"),
    *("recipe-dual-shared", "recipe-dual-yields", "recipe-dual-mixed-pulled"),
    *("recipe-dual-reserve3-soon", "ceiling-dual", "literal-dual", "recipe-dual-carry"),
    *("recipe-dual-carries500", "recipe-dual-soon-joins1000"),
    *("records1", "records2", "records8", "picks", "every", "ceiling-open", "literal-open"),
]
JOINING = 1000  # steps from two softmaxes to one
SHUT = -1e4  # an initial logit of history with which no query sees it; it gets no gradient


DUAL = {
    "shared": Shared,
    "taught": Taught,
    "mixed": Mixed,
    "pulled": Pulled,
    "yields": Yields,
}


@dataclass(frozen=True)
class Arm:
    """One arm, read from its name."""

    base: str
    added: dict[str, int | None]  # with the number of `WITH_NUMBER`

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Read "records8-even-drop"."""
        base, *words = name.split("-")
        added = {}
        for word in words:
            numbered = re.fullmatch(f"({'|'.join(WITH_NUMBER)})(\\d+)", word)
            added[numbered[1] if numbered else word] = int(numbered[2]) if numbered else None
        if not (base in PLAIN or re.fullmatch(r"records\d+", base)):
            raise UserError(f"there is no arm {base!r}; there are {', '.join(PLAIN)}, recordsR")
        if wrong := [more for more in added if more not in ADDED]:
            raise UserError(f"{name}: {wrong[0]!r} is none of {', '.join(ADDED)}")
        lacking = {"none": OF_HISTORY, "carry": OF_HISTORY}.get(base, OF_SUB_LATENTS)
        if base in WITHOUT_SUB_LATENTS and (wrong := [more for more in added if more in lacking]):
            raise UserError(f"{name}: {base} has nothing for {wrong[0]!r} to change")
        for group in ALTERNATIVES:
            if len(both := [more for more in added if more in group]) > 1:
                raise UserError(f"{name}: {both[0]!r} and {both[1]!r} do not go together")
        if wrong := [more for more in added if (added[more] is None) == (more in WITH_NUMBER)]:
            raise UserError(f"{name}: {wrong[0]!r} needs a number, as in {wrong[0]}500")
        if "dual" not in added and (wrong := [more for more in added if more in OF_DUAL]):
            raise UserError(f"{name}: {wrong[0]!r} is for dual attention: add -dual")
        return cls(base, added)

    @property
    def has_history(self) -> bool:
        """Whether there are latents."""
        return self.base not in ("none", "carry")

    @property
    def compression(self) -> CompressionSettings:
        """When history enters training, and when two softmaxes become one."""
        return CompressionSettings(
            off_steps=100 if "soon" in self.added else self.added.get("from", 1000),
            join_after=self.added.get("joins", "never"),
            join_steps=JOINING,
        )

    @property
    def attention(self) -> type[Attention] | None:
        """That of its blocks, if it is not one of the package's."""
        if "own" in self.added:
            return OwnProjections
        changes = tuple(kind for name, kind in DUAL.items() if name in self.added)
        return type("Changed", changes, {}) if changes else None

    def bias(self, block: str) -> float:
        """The initial logit of history in one of `BLOCKS`."""
        if block not in ([each for each in BLOCKS if each in self.added] or BLOCKS):
            return SHUT
        return 0.0 if "open" in self.added else INITIAL_AGE_LOGIT

    def settings(self, card: ModelSettings) -> ModelSettings:
        """The model's: `card` with the arm's layers above as many RWKV blocks, and its history."""
        length, carries = card.chunk_length, bool({"carry", "carries"} & {self.base, *self.added})
        kind = "dual-attention" if "dual" in self.added else "attention"
        changes: dict[str, object] = {
            "state_carry": carries,
            "layers": f"{card.layer_kinds.count('rwkv')}xrwkv,2x{kind}",
        }
        match self.base:
            case "ceiling":
                changes["latents"] = length
            case "literal" | "local":
                changes["compressor"] = "literal"
            case "picks":
                changes |= {"latents": length // 4, "sub_latents": 1}
            case "every":
                changes |= {"latents": length // 4, "sub_latents": 4}
            case base if base.startswith("records"):
                changes["sub_latents"] = int(base.removeprefix("records"))
        return card.model_copy(update=changes)

    def compressor(self, width: Channels, s: ModelSettings) -> nn.Module:
        """What makes latents."""
        match self.base:
            case "ceiling":
                made: nn.Module = Uncompressed(s, width)
            case "mean":
                made = MeanPool(s, width)
            case "literal":
                made = LiteralCompressor(s, width)
            case "local":
                made = LocalLiteral(s, width)
            case _:
                varied = (COMPRESSORS[name] for name in self.added if name in COMPRESSORS)
                made = next(varied, RecordsCompressor)(s, width)
        if "still" in self.added:
            made.register_forward_pre_hook(lambda _, given: (given[0].detach(), given[1]))
        return Detached(made) if "detached" in self.added else made


class Matched(I3LM):
    """Also trained so that a token's sub-latent gives the keys and values that the token gives.

    The error is relative to their size, over all attention blocks. It trains only the projections
    from tokens to sub-latents and back.
    """

    weight = 0.1  # against the loss of the language model
    every = 8  # one token of so many

    def forward(
        self, tokens: Tensor, targets: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        """As `I3LM.forward`; losses include that of the match."""
        below, after = self.below(tokens, depth, state)
        losses = self.losses(self.above(below, gate), targets)
        missed = self.weight * self.missed(below.x)
        return losses + missed * (targets != IGNORE), after

    def missed(self, x: Tensor) -> Tensor:
        """Relative error of chunks: x [B, K, T, D] -> [B, K, 1] fp32."""
        c = self.compressor
        normed = c.norm_in(x[..., self.every - 1 :: self.every, :].detach()).detach()
        token = c.token(c.norm_out(c.record(normed)))
        weights = [
            p.computed(p.weight.detach()) for p in (b.attention.key_value for b in self.upper)
        ]
        errors, sizes = (
            sum(linear(y, weight).float().square().mean((-2, -1)) for weight in weights)
            for y in (token - normed, normed)
        )
        return (errors / sizes).unsqueeze(-1)


class CarriesLater(I3LM):
    """RWKV state is emptied before every chunk until `carries` is 1, not 0."""

    def __init__(self, settings: ModelSettings, bos_id: int):
        super().__init__(settings, bos_id)
        self.register_buffer("carries", torch.ones(()), persistent=False)

    def run_lower(
        self, x: Tensor, restart: Tensor, states: list[LayerState] | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """As `I3LM.run_lower`."""
        begins = torch.arange(x.shape[1], device=x.device) % self.settings.chunk_length == 0
        return super().run_lower(x, restart | (begins & (self.carries == 0)), states)


def named_arm(name: str) -> str:
    """The name, if there is such an arm: a type for argparse."""
    Arm.parse(name)
    return name


def read_halfway(model: I3LM) -> None:
    """Have the compressor read the residual stream after half of the RWKV blocks."""
    halfway: list[Tensor] = []

    def keep(_: nn.Module, given: object, out: tuple[Tensor, object]) -> None:
        halfway[:] = [out[0]]

    model.lower[len(model.lower) // 2 - 1].register_forward_hook(keep)
    model.compressor.register_forward_pre_hook(lambda _, given: (halfway.pop(), given[1]))


def replace_history(model: I3LM, arm: Arm) -> None:
    """Replace compressor and attention by those of the arm."""
    settings = model.settings
    if "shared" in arm.added:
        joint = settings.layers.replace("dual-attention", "attention")
        settings = settings.model_copy(update={"layers": joint})
        model.stack = Stack.of(settings)
    model.compressor = arm.compressor(model.width, settings)  # type: ignore[assignment]
    model.slots = Slots(model.width, model.keys_per_chunk)
    if "early" in arm.added:
        read_halfway(model)
    if arm.compression.joins:
        model.join_softmaxes(0.0)  # before it is compiled
    for place, block in zip(BLOCKS, model.upper, strict=True):
        if kind := arm.attention:
            block.attention = kind(model.width, settings.heads, settings.history_chunks)
        if "reserve" in arm.added:
            nn.init.constant_(block.attention.reserve_bias, arm.added["reserve"])
        nn.init.constant_(block.attention.age_bias, arm.bias(place))


def build(name: str, settings: ModelSettings, bos_id: int, seed: int) -> I3LM:
    """The model of an arm.

    With one seed, arms have the same initial weights up to the first part that differs in shape.
    """
    arm = Arm.parse(name)
    settings = arm.settings(settings)
    special = {"match": Matched, "carries": CarriesLater}
    with_history = next((kind for name, kind in special.items() if name in arm.added), I3LM)
    model = (with_history if arm.has_history else WithoutHistory)(settings, bos_id)
    if arm.has_history:
        replace_history(model, arm)
    torch.manual_seed(seed)
    model.reset_parameters()
    return model
