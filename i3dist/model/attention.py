"""Causal attention over a chunk and its compressed history.

Letters: N rows (chunks), H heads, T query tokens, S keys, C history chunks, M latents, D width.

Tokens carry no positions: the RWKV blocks below give order (as in Jamba, Lieber et al., 2024,
arXiv:2403.19887). Latents carry a learned age, 1 to C chunks, and a learned slot, 0 to M - 1.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from i3dist.model.layers import FeedForward, adjust_heads, linear, merge_heads, split_heads


class HistoryEmbedding(nn.Module):
    """The learned age and slot of latents, shared by the attention blocks."""

    def __init__(self, width: int, chunks: int, latents: int):
        super().__init__()
        self.age = nn.Parameter(torch.zeros(chunks, width))  # row 0 is the oldest chunk
        self.slot = nn.Parameter(torch.zeros(latents, width))


def attention_bias(own: Tensor, history: Tensor, gate: Tensor, latents: int) -> Tensor:
    """Additive bias on the logits of [history latents, own tokens]: [N, 1, T, C * M + S] fp32.

    Gate g adds log g to history, so g = 0 masks it out. A token always sees itself, so no row is
    masked completely.

    Args:
        own: [N, T, S] bool, which tokens of the chunk a query sees.
        history: [N, T, C] bool, which earlier chunks it sees, oldest first.
        gate: scalar g in [0, 1].
        latents: M.
    """
    never = torch.tensor(float("-inf"), device=own.device)
    past = torch.where(history, gate.float().log(), never).repeat_interleave(latents, dim=-1)
    return torch.cat([past, torch.where(own, 0.0, never)], dim=-1).unsqueeze(1)


class Attention(nn.Module):
    """Multi-head attention over latents of earlier chunks, then tokens. 4 D^2 parameters."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = adjust_heads(width, heads)
        self.query = linear(width, width)
        self.key_value = linear(width, 2 * width)
        self.output = linear(width, width)

    def keys_values(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x [..., S, D] -> keys and values, each [..., H, S, D/H]."""
        key, value = self.key_value(x).chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def history_keys_values(
        self, latents: Tensor, embed: HistoryEmbedding
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of every window of C consecutive chunks: [B, K, H, C * M, D/H] each.

        The projection is linear, so that a latent is projected once for all the ages it takes.

        Args:
            latents: [B, C + K, M, D], oldest first; chunk k of K sees chunks k to k + C - 1.
            embed: ages and slots.
        """
        chunks = embed.age.shape[0]
        projected = self.key_value(latents + embed.slot)  # [B, C + K, M, 2D]
        windows = projected.unfold(1, chunks, 1)[:, :-1]  # [B, K, M, 2D, C]
        windows = windows.movedim(-1, 2) + self.key_value(embed.age)[:, None]
        key, value = windows.flatten(2, 3).chunk(2, dim=-1)  # [B, K, C * M, D] each
        return split_heads(key, self.heads), split_heads(value, self.heads)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor, bias: Tensor) -> Tensor:
        """x [N, T, D]; keys, values [N, H, S, D/H]; bias [N, 1, T, S] -> [N, T, D]."""
        query = split_heads(self.query(x), self.heads)
        mixed = F.scaled_dot_product_attention(query, keys, values, attn_mask=bias.to(x.dtype))
        return self.output(merge_heads(mixed))


class AttentionBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a residual connection. 12 D^2 parameters."""

    def __init__(self, width: int, heads: int, mult: int):
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.norm_ff = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.ff = FeedForward(width, mult)

    def forward(
        self,
        x: Tensor,
        past: tuple[Tensor, Tensor],
        own: tuple[Tensor, Tensor] | None,
        bias: Tensor,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """x [N, T, D] -> the same, and the keys and values of all the chunk's tokens so far.

        Args:
            x: the residual stream.
            past: keys and values of history, [N, H, C * M, D/H] each.
            own: keys and values of tokens of this chunk before x, or None.
            bias: [N, 1, T, C * M + S] from `attention_bias`.
        """
        normed = self.norm_attention(x)
        now = self.attention.keys_values(normed)
        if own is not None:
            now = (torch.cat([own[0], now[0]], dim=-2), torch.cat([own[1], now[1]], dim=-2))
        keys = torch.cat([past[0], now[0]], dim=-2)
        values = torch.cat([past[1], now[1]], dim=-2)
        x = x + self.attention(normed, keys, values, bias)
        return x + self.ff(self.norm_ff(x)), now
