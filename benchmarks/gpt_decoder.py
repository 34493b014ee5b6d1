"""GPTs that decode with a preallocated cache of keys and values, to compare with.

Notation: B rows, L tokens of context, D width, H heads, G heads of keys and values, F width of the
feed-forward, V vocabulary.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3dist.inference.recording import Recorded
from i3dist.inference.sampling import Sampling
from i3dist.inference.steps import compile_if
from i3dist.inference.token_stream import choose_tokens


@dataclass(frozen=True)
class Shape:
    """Sizes of a GPT."""

    layers: int = 22
    width: int = 1024
    heads: int = 16
    groups: int = 16  # G: each serves H / G heads (Ainslie et al., 2023, arXiv:2305.13245)
    feed_forward: int = 4032
    vocab: int = 32_000


# The first two have as many parameters as i3-4096ctx, to 0.1%; the last is shaped as GPT-2.
EQUAL, GROUPED = Shape(), Shape(groups=4, feed_forward=4800)
SMALL = Shape(12, 768, 12, 12, 3072, 50_257)


class Block(nn.Module):
    """Causal attention and feed-forward."""

    def __init__(self, shape: Shape):
        super().__init__()
        each = shape.width // shape.heads
        self.sizes = [shape.width, shape.groups * each, shape.groups * each]
        self.each = each
        self.norm_attention = nn.LayerNorm(shape.width, bias=False)
        self.norm_ff = nn.LayerNorm(shape.width, bias=False)
        self.query_key_value = nn.Linear(shape.width, sum(self.sizes), bias=False)
        self.output = nn.Linear(shape.width, shape.width, bias=False)
        self.up = nn.Linear(shape.width, shape.feed_forward, bias=False)
        self.down = nn.Linear(shape.feed_forward, shape.width, bias=False)

    def parts(self, x: Tensor) -> list[Tensor]:
        """Queries, keys and values [B, heads, T, D/H] of x [B, T, D]."""
        parts = self.query_key_value(self.norm_attention(x)).split(self.sizes, dim=-1)
        return [part.unflatten(-1, (-1, self.each)).transpose(1, 2) for part in parts]

    def finish(self, x: Tensor, read: Tensor) -> Tensor:
        """Add what attention read [B, H, T, D/H], then the feed-forward."""
        x = x + self.output(read.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm_ff(x))))


class CachedGPT(nn.Module):
    """A decoder-only transformer with random weights and a head tied to the embedding or not.

    Every step is the one that fills the cache: it reads L - 1 earlier tokens and its own. Such a
    cache needs no mask, which lets attention run at its fastest.
    """

    def __init__(self, shape: Shape, rows: int, context: int, compiled: bool, tied: bool = False):
        super().__init__()
        self.shape, self.compiled = shape, compiled
        self.embedding = nn.Embedding(shape.vocab, shape.width)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.layers))
        self.norm_out = nn.LayerNorm(shape.width, bias=False)
        self.head = nn.Linear(shape.width, shape.vocab, bias=False)
        if tied:
            self.head.weight = self.embedding.weight
        self.requires_grad_(False)
        self.cache_of = (rows, shape.groups, context, shape.width // shape.heads)

    def begin(self, sampling: Sampling) -> None:
        """Allocate the cache, in the model's dtype and on its device."""
        weight = self.head.weight
        self.cache = [
            (weight.new_zeros(self.cache_of), weight.new_zeros(self.cache_of)) for _ in self.blocks
        ]
        rows, _, context, _ = self.cache_of
        self.tokens = torch.arange(rows, device=weight.device)
        self.seeds, self.drawn = self.tokens.clone(), self.tokens[0].clone()
        self.allowed = torch.zeros(self.shape.vocab, device=weight.device)
        self.last = torch.tensor([context - 1], device=weight.device)
        self.sampling = sampling
        self.advance = partial(Recorded(weight.is_cuda), self._step)

    def _step(self) -> None:
        x = self.embedding(self.tokens).unsqueeze(1)
        step = compile_if(self.compiled, block_step)
        for block, (keys, values) in zip(self.blocks, self.cache, strict=True):
            x = step(block, x, keys, values, self.last)
        logits = compile_if(self.compiled, predict)(self, x)
        choose = compile_if(self.compiled, choose_tokens)
        tokens = choose(logits, self.allowed, self.sampling, self.seeds, self.drawn)
        self.tokens.copy_(tokens.clamp(min=0))
        self.drawn.add_(1)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """The logits after a prompt [B, L], read in one forward pass: [B, V]."""
        x = self.embedding(tokens)
        for block in self.blocks:
            query, key, value = block.parts(x)
            grouped = self.shape.groups < self.shape.heads
            read = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=grouped
            )
            x = block.finish(x, read)
        return predict(self, x[:, -1:])

    def bytes_read(self) -> tuple[int, int]:
        """What a step reads of weights, and of the cache."""
        weights = sum(p.nbytes for p in (*self.blocks.parameters(), self.head.weight))
        return weights, sum(part.nbytes for pair in self.cache for part in pair)


def block_step(block: Block, x: Tensor, keys: Tensor, values: Tensor, last: Tensor) -> Tensor:
    """One token of every row, x [B, 1, D]; its keys and values become the last of the cache's."""
    query, key, value = block.parts(x)
    keys.index_copy_(2, last, key)
    values.index_copy_(2, last, value)
    grouped = keys.shape[1] < query.shape[1]
    read = F.scaled_dot_product_attention(query, keys, values, enable_gqa=grouped)
    return block.finish(x, read)


def predict(model: CachedGPT, x: Tensor) -> Tensor:
    """x [B, 1, D] -> logits [B, V] fp32."""
    return model.head(model.norm_out(x)).squeeze(1).float()
