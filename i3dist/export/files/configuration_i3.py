"""The configuration of an i3 model."""

from collections.abc import Sequence
from typing import Any, ClassVar

from transformers import PretrainedConfig


class I3Config(PretrainedConfig):
    """The sizes of an i3 model."""

    model_type = "i3"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "d_model",
        "num_attention_heads": "heads",
    }

    def __init__(
        self,
        vocab_size: int = 32_000,
        d_model: int = 1180,
        layers: Sequence[str] = ("rwkv",) * 12 + ("attention",) * 2,
        heads: int = 10,
        ff_mult: int = 4,
        chunk_length: int = 512,
        latents: int = 32,
        compressor: str = "records",
        sub_latents: int = 4,
        history_chunks: int = 8,
        state_carry: bool = False,
        joined: float = 0.0,
        use_cache: bool = True,
        **others: Any,
    ) -> None:
        """Set the sizes; the defaults are those of i3-4096ctx.

        Args:
            vocab_size: number of tokens V.
            d_model: width D of the residual stream.
            layers: kind of each layer from the bottom: "rwkv", and above them "attention" or
                "dual-attention".
            heads: attention heads, a divisor of `d_model`.
            ff_mult: hidden width of feed-forward and channel-mix, in units of `d_model`.
            chunk_length: tokens T of a chunk.
            latents: latents M that a chunk is compressed to.
            compressor: "records" or "literal".
            sub_latents: of "records": keys R that attention sees of a latent, a divisor of
                `d_model`.
            history_chunks: compressed chunks C that a chunk attends to.
            state_carry: whether RWKV state is carried over chunk ends within a document.
            joined: share j, from 0 to 1, in which the two softmaxes of "dual-attention" are one.
            use_cache: whether the model returns a cache.
            others: what every configuration has.
        """
        self.vocab_size = vocab_size
        self.d_model = d_model
        self.layers = list(layers)
        self.heads = heads
        self.ff_mult = ff_mult
        self.chunk_length = chunk_length
        self.latents = latents
        self.compressor = compressor
        self.sub_latents = sub_latents
        self.history_chunks = history_chunks
        self.state_carry = state_carry
        self.joined = joined
        self.use_cache = use_cache
        super().__init__(**others)

    @property
    def num_hidden_layers(self) -> int:
        """Layers of all kinds."""
        return len(self.layers)
