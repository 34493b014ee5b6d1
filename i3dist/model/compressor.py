"""What a compressor is: the contract of the kinds that `model.compressor` can name.

Notation: T tokens of a chunk, M latents, R sub-latents of a latent, D width.
"""

from typing import ClassVar

from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.model.layers import Channels
from i3dist.ops.linear import linear


class Compressor(nn.Module):
    """Turns a chunk's hidden states into M latents, and latents into keys for attention.

    It is built from the settings and the width D alone. By default attention sees each latent as
    one key of full width.
    """

    of_latents: ClassVar[tuple[str, ...]] = ()
    """Names of projections that latents go through instead of tokens; for the count of FLOPs."""
    uncounted: ClassVar[tuple[str, ...]] = ()
    """Names of projections whose work does not grow with the tokens, or is no product."""

    def __init__(self, settings: ModelSettings, width: Channels) -> None:
        super().__init__()
        self.width, self.latents = width, settings.latents
        self.sub_latents = 1
        """R: attention sees a latent as so many keys."""

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """[..., T, D] -> latents [..., M, D]. Each chunk is compressed by itself.

        Args:
            hidden: the residual stream below history; padded channels are 0 and must stay so.
            keep: [..., T] bool, at least one position of every chunk. Nothing of the others, which
                belong to another document, may reach a latent; they may hold NaN.
        """
        raise NotImplementedError

    def project(self, latents: Tensor, weight: Tensor, view: int = 0) -> Tensor:
        """What attention sees of latents [..., M, D], times a weight [out, D]: [..., M R, out].

        Kinds override `split` and `through` instead: decoding calls these, and `through` only once.

        Args:
            latents: of any chunks.
            weight: the matrix.
            view: which of `Stack.views`.
        """
        return linear(self.split(latents), self.through(weight, view))

    def split(self, latents: Tensor) -> Tensor:
        """Latents [..., M, D] -> the sub-latents that attention sees as keys, [..., M R, d]."""
        return latents

    def through(self, weight: Tensor, view: int = 0) -> Tensor:
        """A weight [out, D] -> what multiplies sub-latents in its place, [out, d].

        It depends on the view (`Stack.views`) in compressors that show latents to layers in
        different ways; by default all see the latents as they are.
        """
        return weight

    def reset_parameters(self) -> None:
        """Initialize what differs from the model's rule for matrices, which has been applied."""
