"""What a layer of the stack is: the contract of layer kinds.

Notation: N rows, T tokens, D width.
"""

from typing import ClassVar, NamedTuple, Protocol

from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.model.layers import Channels
from i3dist.ops.attention import KeysValues, Visibility, Window, block_visibility

LayerState = tuple[Tensor, ...]  # the parts of one layer's state


class Place(NamedTuple):
    """What a block is built for, and where it stands among the blocks of its kind."""

    settings: ModelSettings
    width: Channels  # D
    nth: int  # from the bottom, 0 first
    total: int  # number of them


class Project(Protocol):
    """Multiplies what a layer sees of earlier chunks by a matrix."""

    def __call__(self, weight: Tensor, view: int = 0) -> Tensor:
        """[out, D] -> [B, C + K, M, out], the oldest chunk first.

        Args:
            weight: the matrix.
            view: which of the layer's views is multiplied.
        """
        ...


class Block(nn.Module):
    """A layer of any kind. It is built from its `Place` alone."""

    sees_history: ClassVar[bool]
    kept_values: ClassVar[int] = 20
    """Values per token and channel that the backward pass needs; for the memory estimate."""

    def __init__(self, place: Place) -> None:
        super().__init__()

    def reset_parameters(self) -> None:
        """Initialize what differs from the model's rule for matrices, which has been applied."""


class LowerBlock(Block):
    """A layer below the compressor, which sees no history.

    Decoding calls the same `forward` on the newest tokens with the state of those before. So a
    call over T tokens must equal T calls over one token each.
    """

    sees_history = False
    state_parts: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that the layer carries from one token to the next."""

    @classmethod
    def empty_state(cls, rows: int, width: int, like: Tensor) -> LayerState:
        """The state before the first token: a tensor [rows, ..., width] for each state part.

        By default zeros [rows, width] of the device and dtype of `like`.
        """
        return tuple(like.new_zeros(rows, width) for _ in cls.state_parts)

    def forward(self, x: Tensor, restart: Tensor, state: LayerState) -> tuple[Tensor, LayerState]:
        """x [N, T, D] -> the same, and the detached state after it.

        Args:
            x: the residual stream; padded channels are 0 and must stay so.
            restart: [N, T] bool; nothing from before such a token may reach it or what follows.
            state: what stands before x.
        """
        raise NotImplementedError


class HistoryBlock(Block):
    """A layer above the compressor, which sees compressed history.

    Decoding calls the same `forward` on the newest tokens with the keys and values of the chunk's
    tokens before, `own`. So the results must not depend on how a chunk is cut into calls.
    """

    sees_history = True
    views: ClassVar[int] = 0
    """Views of latents that are the layer's own (`Compressor.project`); layers with 0 share one."""

    @staticmethod
    def fused_visibility(window: Window, gate: Tensor) -> Visibility:
        """What `forward` is given as `visible` where a fused kernel computes it: by default for
        `attend`. Elsewhere every kind is given the matrix of `attention_bias`.

        Args:
            window: the chunks of B lanes, and their history.
            gate: scalar g in [0, 1] of history.
        """
        return block_visibility(window, gate)

    def join_softmaxes(self, share: float) -> None:
        """See `I3LM.join_softmaxes`; by default nothing, as of a layer that has no two softmaxes.

        A layer keeps the share in a buffer that it changes in place: it is compiled and recorded
        once.
        """

    def history(self, project: Project) -> KeysValues:
        """Keys and values of all chunks that a window sees: [B, (C + K) * M, D] each."""
        raise NotImplementedError

    def forward(
        self, x: Tensor, past: KeysValues, own: KeysValues | None, visible: Visibility
    ) -> tuple[Tensor, KeysValues]:
        """x [B, K, T, D] -> the same, and keys and values of all the chunk's tokens so far,
        detached.

        Args:
            x: the residual stream.
            past: keys and values of history, [B, (C + K) * M, D] each.
            own: keys and values of the chunk's tokens before x, or None. Batched decoding gives
                room for a whole chunk, and hides what is not of a token before x.
            visible: what each token sees of history and of its chunk.
        """
        raise NotImplementedError
