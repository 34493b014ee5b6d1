"""A GPT of i3-4096ctx's size, to compare with: pre-norm blocks, GELU, an untied head.

Notation: B rows, T tokens, D width, F width of the feed-forward, H heads, V vocabulary.

With the defaults 339,522,560 parameters, 0.2% fewer than i3-4096ctx: its feed-forward has 4,032
channels. Four times the width, as is usual, would be 0.9% more. Positions are fixed sinusoids
(Vaswani et al., 2017, arXiv:1706.03762), which cost neither parameters nor time in the blocks.
"""

import functools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from i3dist.model.segments import causal_mask, segment_ids
from i3dist.ops.attention import merge_heads, split_heads
from i3dist.ops.cross_entropy import token_losses

Mask = BlockMask | Tensor


class Block(nn.Module):
    """Causal attention and feed-forward. 4 D^2 + 2 D F parameters and two norms."""

    def __init__(self, width: int, heads: int, feed_forward: int):
        super().__init__()
        self.heads = heads
        self.norm_attention = nn.LayerNorm(width, bias=False)
        self.norm_ff = nn.LayerNorm(width, bias=False)
        self.query_key_value = nn.Linear(width, 3 * width, bias=False)
        self.output = nn.Linear(width, width, bias=False)
        self.up = nn.Linear(width, feed_forward, bias=False)
        self.down = nn.Linear(feed_forward, width, bias=False)

    def forward(self, x: Tensor, mask: Mask | None) -> Tensor:
        """x [B, T, D] -> the same; without a mask a token sees every earlier one of its row."""
        parts = self.query_key_value(self.norm_attention(x)).chunk(3, dim=-1)
        query, key, value = (split_heads(part, self.heads) for part in parts)
        if isinstance(mask, BlockMask):
            read = flex_attention(query, key, value, block_mask=mask)
        else:
            read = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None)
        x = x + self.output(merge_heads(read))
        return x + self.down(F.gelu(self.up(self.norm_ff(x))))


class GPT(nn.Module):
    """Decoder-only transformer."""

    positions: Tensor

    def __init__(
        self,
        length: int,
        vocab: int = 32_000,
        layers: int = 22,
        width: int = 1024,
        heads: int = 16,
        feed_forward: int = 4032,
    ):
        """Build the model for rows of up to `length` tokens."""
        super().__init__()
        self.embedding = nn.Embedding(vocab, width)
        self.blocks = nn.ModuleList(Block(width, heads, feed_forward) for _ in range(layers))
        self.norm_out = nn.LayerNorm(width, bias=False)
        self.head = nn.Linear(width, vocab, bias=False)
        self.register_buffer("positions", sinusoids(length, width), persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                ends_branch = name.endswith(("output.weight", "down.weight"))
                nn.init.normal_(
                    parameter, std=0.02 / math.sqrt(2 * layers) if ends_branch else 0.02
                )

    def compile_blocks(self) -> None:
        """Compile block by block, with one compilation for all."""
        for block in self.blocks:
            block.compile(dynamic=False)
        self.losses = torch.compile(self.losses, dynamic=False)  # type: ignore[method-assign]

    def forward(self, tokens: Tensor, targets: Tensor, mask: Mask | None = None) -> Tensor:
        """Cross-entropy of every position [B, T] fp32, 0 where the target is `IGNORE`.

        Args:
            tokens: [B, T] int64.
            targets: [B, T] int64.
            mask: from `document_mask`; None lets documents of a row see each other.
        """
        embedded = self.embedding(tokens)
        x = embedded + self.positions[: tokens.shape[1]].to(embedded.dtype)
        for block in self.blocks:
            x = block(x, mask)
        return self.losses(x, targets)

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [B, T] of the blocks' output [B, T, D]."""
        return token_losses(self.norm_out(x), self.head.weight, targets)


def sinusoids(length: int, width: int) -> Tensor:
    """Sines and cosines of position at wavelengths from 2 pi to 20,000 pi: [length, width]."""
    rates = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000) / width))
    angles = torch.arange(length).unsqueeze(1) * rates
    # As small as token embeddings are at the start.
    return 0.02 * torch.cat([angles.sin(), angles.cos()], dim=1)


def document_mask(tokens: Tensor, bos_id: int) -> Mask:
    """Causal attention inside each document of packed rows [B, T]."""
    segments = segment_ids(tokens, bos_id)
    if not tokens.is_cuda:  # flex attention has no backward pass there
        return causal_mask(segments).unsqueeze(1)
    rows, length = segments.shape

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (key <= query) & (segments[row, query] == segments[row, key])

    return _create_mask()(sees, rows, None, length, length, device=tokens.device)


@functools.cache
def _create_mask() -> Callable[..., BlockMask]:
    """Compiled, as it would otherwise run a kernel for each term of the rule."""
    return torch.compile(create_block_mask, dynamic=False)
