"""The arms of benchmarks/history.py: i3-4096ctx with something else for its history.

  none        no history
  literal     the card's compressor: learned queries read the whole chunk
  anchored    queries are learned + the mean of their span, which stays in the latent
  slotsR      latents are R projected tokens of their span, which attention sees one by one
  tailR       the same with unequal spans: half of the latents hold the chunk's last tokens
  hashed      latents gather tokens by what stands before them, over the whole chunk; attention
              begins to find them as tokens found them (with key and value projections of its own)
  mean        means of the spans, normalised: no compressor
  ceiling     no compression: every token of the last 4,096
  carry       no history, RWKV state carried from chunk to chunk

and added to these

  -kv         history has key and value projections of its own in every attention block
  -gate       a learned logit of history, by head and by what asks, which begins low
  -drop       a tenth of the chunks is trained without history
  -carry      RWKV state carried
  -detached   what makes latents is left as it began
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from compressors import (
    Anchored,
    Detached,
    Hashed,
    MeanPool,
    Slots,
    Uncompressed,
    equal_spans,
    tail_spans,
)
from i3_steps import WithoutHistory
from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.model.attention import Attention, HistoryEmbedding
from i3dist.model.layers import ALIGNMENT, Channels, Linear, merge_heads, split_heads
from i3dist.model.lm import I3LM
from i3dist.ops.attention import Visibility, attend

CLOSED = -4.0  # what the logit of history begins at


class Unfolding(I3LM):
    """Attention sees R vectors for each latent, and projects them as it does tokens."""

    def __init__(self, settings: ModelSettings, bos_id: int, spans: list[int], slots: int):
        super().__init__(settings, bos_id)
        s, width = settings, self.width
        self.compressor = Slots(width, s.ff_mult, spans, slots)  # type: ignore[assignment]
        self.slots = self.compressor.heads
        self.keys_per_chunk = s.latents * self.slots
        self.history = HistoryEmbedding(width, s.history_chunks, self.keys_per_chunk)
        self.unfold = Linear(width, width.times(self.slots))

    def begin(self) -> None:
        """Unfold a slot to the token that it was projected from."""
        d = self.width.stored
        nn.init.zeros_(self.unfold.weight)
        places = self.unfold.weight.view(self.slots, d, self.slots, d // self.slots)
        slots = next(module for module in self.modules() if isinstance(module, Slots))
        for i, rows in enumerate(slots.projections()):
            places[i, :, i] = rows.T * self.slots**0.5

    def history_keys_values(self, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As `I3LM.history_keys_values`."""
        each = self.unfold(latents).unflatten(-1, (self.slots, -1)).flatten(2, 3)
        return super().history_keys_values(each)


class OwnProjections(Attention):
    """Attention that projects latents by matrices of their own."""

    def __init__(self, width: Channels, heads: int):
        super().__init__(width, heads)
        self.latent_key_value = Linear(width, width.times(2).split(2 * self.heads))

    def history_keys_values(
        self, latents: Tensor, embed: HistoryEmbedding
    ) -> tuple[Tensor, Tensor]:
        """As `Attention.history_keys_values`."""
        tokens, self.key_value = self.key_value, self.latent_key_value
        try:
            return super().history_keys_values(latents, embed)
        finally:
            self.key_value = tokens


class Gated(nn.Module):
    """Attention whose logits of history are b_h(x) higher, by head and query.

    Keys get one more channel, 1 for history and 0 for tokens, and queries b_h(x) there.
    """

    def __init__(self, attention: Attention, width: Channels):
        super().__init__()
        self.inner = attention
        self.heads, self.scale = attention.heads, attention.scale
        self.gate = Linear(width, Channels(self.heads, alignment=1))
        self.bias = nn.Parameter(torch.zeros(self.heads))

    def begin(self) -> None:
        """Every query begins the same."""
        nn.init.zeros_(self.gate.weight)
        nn.init.constant_(self.bias, CLOSED)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As `Attention.keys_values`, with the additional channels."""
        return self._marked(*self.inner.keys_values(x), 0.0)

    def history_keys_values(
        self, latents: Tensor, embed: HistoryEmbedding
    ) -> tuple[Tensor, Tensor]:
        """As `Attention.history_keys_values`, with the additional channels."""
        return self._marked(*self.inner.history_keys_values(latents, embed), 1.0)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, visible: Visibility) -> Tensor:
        """As `Attention.forward`."""
        query = split_heads(self.inner.query(x), self.heads)
        bias = (self.gate(x) + self.bias[: self.heads]).transpose(-1, -2).unsqueeze(-1)
        query = torch.cat([query, F.pad(bias / self.scale, (0, ALIGNMENT - 1))], dim=-1)
        read = attend(query, keys, values, visible, self.scale)[..., :-ALIGNMENT]
        return self.inner.output(merge_heads(read))

    @staticmethod
    def _marked(keys: Tensor, values: Tensor, mark: float) -> tuple[Tensor, Tensor]:
        channel = F.pad(torch.full_like(keys[..., :1], mark), (0, ALIGNMENT - 1))
        return torch.cat([keys, channel], dim=-1), F.pad(values, (0, ALIGNMENT))


@dataclass(frozen=True)
class Arm:
    """One arm; the defaults are the card's."""

    compressor: Callable[[I3LM], nn.Module] | None = None
    slots: int = 0  # of a latent; 0 where latents have none
    tail: bool = False  # half of the latents hold the chunk's last tokens
    history: bool = True
    compressed: bool = True
    own_projections: bool = False
    gated: bool = False
    carries: bool = False
    detached: bool = False
    drops: bool = False

    @classmethod
    def parse(cls, name: str) -> "Arm":
        """Read "slots4-gate"."""
        base, *more = name.split("-")
        slots = re.fullmatch(r"(slots|tail)(\d+)", base)
        return cls(
            compressor=COMPRESSORS.get(base),
            slots=int(slots[2]) if slots else 0,
            tail=base.startswith("tail"),
            history=base not in ("none", "carry"),
            compressed=base != "ceiling",
            own_projections="kv" in more or base == "hashed",
            gated="gate" in more,
            carries="carry" in (base, *more),
            detached="detached" in more,
            drops="drop" in more,
        )


COMPRESSORS: dict[str, Callable[[I3LM], nn.Module]] = {
    "anchored": lambda m: Anchored(m.width, m.settings.heads, m.settings.ff_mult, _equal(m)),
    "hashed": lambda m: Hashed(m.width, m.settings.heads, m.settings.ff_mult, m.settings.latents),
    "mean": lambda m: MeanPool(m.width, _equal(m)),
    "ceiling": lambda m: Uncompressed(m.width),
}
ARMS = [
    *("none", "literal", "literal-gate", "literal-detached", "anchored", "mean", "mean-kv"),
    *("mean-gate", "slots1", "slots1-gate", "slots1-gate-carry", "slots1-gate-detached"),
    *("slots4", "slots4-gate", "slots4-gate-drop", "slots4-detached", "hashed", "hashed-gate"),
    *("tail1", "tail1-gate", "tail2-gate", "ceiling", "ceiling-gate", "carry"),
]


def _equal(model: I3LM) -> list[int]:
    return equal_spans(model.settings.chunk_length, model.settings.latents)


def build(name: str, settings: ModelSettings, bos_id: int, seed: int) -> I3LM:
    """The model of an arm. What arms of a seed have in common begins with the same weights, up to
    the first part that differs in shape."""
    arm = Arm.parse(name)
    changes: dict[str, object] = {"state_carry": arm.carries}
    if not arm.compressed:
        changes["latents"] = settings.chunk_length
    changed = settings.model_copy(update=changes)
    if arm.slots:
        sizes = (settings.chunk_length, settings.latents)
        spans = tail_spans(*sizes, arm.slots) if arm.tail else equal_spans(*sizes)
        model: I3LM = Unfolding(changed, bos_id, spans, arm.slots)
    else:
        model = (I3LM if arm.history else WithoutHistory)(changed, bos_id)
    if arm.compressor:
        model.compressor = arm.compressor(model)  # type: ignore[assignment]
    if arm.detached:
        model.compressor = Detached(model.compressor)  # type: ignore[assignment]
    for block in model.attention:
        if arm.own_projections:
            block.attention = OwnProjections(model.width, settings.heads)
        if arm.gated:
            block.attention = Gated(block.attention, model.width)  # type: ignore[arg-type]
    _draw(model, seed)
    return model


@torch.no_grad()
def _draw(model: I3LM, seed: int) -> None:
    """Draw all weights, replaced parts' as well, and let each part set what it begins with."""
    torch.manual_seed(seed)
    model._initialise()
    for module in reversed(list(model.modules())):  # parts before the whole
        if hasattr(module, "begin"):
            module.begin()
    if isinstance(model.compressor, Hashed):
        _share_addresses(model, model.compressor)


def _share_addresses(model: I3LM, compressor: Hashed) -> None:
    """Let attention look for what followed a context as the compressor files it."""
    d = model.width.stored
    for block in model.attention:
        attention = getattr(block.attention, "inner", block.attention)
        attention.query.weight.copy_(compressor.key_value.weight[:d])
        keys, values = attention.latent_key_value.weight.split(d)
        nn.init.eye_(values)
        keys.copy_(0.3 * values)  # of what a slot holds, little: its address is what counts
    model.history.slot.copy_(compressor.queries)
