"""The layer kinds that `model.layers` can name, and the stack that it describes.

To add a kind, derive a class from `LowerBlock` or `HistoryBlock` and register it
(docs/extending.md).
"""

from itertools import accumulate
from typing import NamedTuple

from i3dist.config import ModelSettings
from i3dist.errors import UserError
from i3dist.model.attention import AttentionBlock
from i3dist.model.block import Block, HistoryBlock, LowerBlock
from i3dist.model.dual_attention import DualAttentionBlock
from i3dist.model.rwkv import RwkvBlock
from i3dist.registry import Registry

LAYER_KINDS: Registry[type[Block]] = Registry("layer kind")
LAYER_KINDS.register("rwkv")(RwkvBlock)
LAYER_KINDS.register("attention")(AttentionBlock)
LAYER_KINDS.register("dual-attention")(DualAttentionBlock)


class Layer(NamedTuple):
    """One layer of a stack."""

    kind: str
    nth: int  # among the layers of its kind, from the bottom, 0 first
    total: int  # number of them


class Stack(NamedTuple):
    """The layers of a model from the bottom: those below the compressor, and those above."""

    lower: list[Layer]
    upper: list[Layer]

    @classmethod
    def of(cls, settings: ModelSettings, place: str = "") -> "Stack":
        """The stack of `model.layers`; `place` begins the line about one that cannot be.

        The compressor reads the residual stream below the lowest layer that sees history. Then no
        latent depends on history, and the chunks of a window can be trained side by side.

        Raises:
            UserError: it names an unknown kind, or has a layer on the wrong side of the compressor.
        """
        stack, kinds = cls([], []), settings.layer_kinds
        setting = f"{place}setting model.layers={settings.layers}"
        for number, kind in enumerate(kinds):
            above = LAYER_KINDS.of(kind, f"{setting}: ").sees_history
            if stack.upper and not above:
                raise UserError(
                    f"{setting}: {kind} stands above {kinds[number - 1]}, which sees history; the "
                    f"compressor reads all {kind} layers, so move them below"
                )
            layer = Layer(kind, kinds[:number].count(kind), kinds.count(kind))
            (stack.upper if above else stack.lower).append(layer)
        if not stack.lower:
            raise UserError(f"{setting} has no layer for the compressor to read: add rwkv below")
        if not stack.upper:
            raise UserError(f"{setting} has no layer that sees history: add attention on top")
        return stack

    @property
    def views(self) -> list[range]:
        """Numbers of the views that each upper layer has of latents: its own, or 0, which layers
        without any share."""
        own = [upper_kind(layer).views for layer in self.upper]
        stops = accumulate(own, initial=int(0 in own))
        pairs = zip(own, list(stops)[1:], strict=True)
        return [range(stop - count, stop) if count else range(1) for count, stop in pairs]


def upper_kind(layer: Layer) -> type[HistoryBlock]:
    """The class of a layer above the compressor."""
    kind = LAYER_KINDS.of(layer.kind)
    assert issubclass(kind, HistoryBlock)
    return kind


def lower_kind(layer: Layer) -> type[LowerBlock]:
    """The class of a layer below the compressor."""
    kind = LAYER_KINDS.of(layer.kind)
    assert issubclass(kind, LowerBlock)
    return kind
