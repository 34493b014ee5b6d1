"""docs/model.md, written out line by line: one chunk and one head at a time, no masks, no kernels.

It uses nothing of the model but its parameters, by their names in checkpoints, which never change.
"""

import math

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import gelu, layer_norm

from tests.model.conftest import BOS, SMALL, build, each_variant
from tests.model.streams import depth_of, logits, stream

T, D, C, M, H = (
    SMALL[name] for name in ("chunk_length", "d_model", "history_chunks", "latents", "heads")
)


class Written:
    """The equations with the weights of a model."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights
        self.literal = "compressor.key_value.weight" in weights
        if not self.literal:
            self.width = len(weights["compressor.key.weight"])  # D/R
            self.count = M * D // self.width  # S

    def of(self, block: str, name: str) -> Tensor:
        return self.weights[f"{block}.{name}"]

    def times(self, x: Tensor, block: str, name: str) -> Tensor:
        return x @ self.of(block, f"{name}.weight").T

    def norm(self, x: Tensor, name: str) -> Tensor:
        scale, offset = self.of(name, "weight"), self.of(name, "bias")
        return layer_norm(x, x.shape[-1:], scale, offset)

    def blocks(self, kind: str) -> list[str]:
        numbers = {name.split(".")[1] for name in self.weights if name.startswith(f"{kind}.")}
        return [f"{kind}.{number}" for number in sorted(numbers, key=int)]

    def mixed(self, n: Tensor, share: Tensor, restart: Tensor) -> Tensor:
        before = torch.cat([torch.zeros_like(n[:1]), n[:-1]])
        before[restart] = 0.0
        return before + (n - before) * share

    def time_mix(self, x: Tensor, block: str, restart: Tensor) -> Tensor:
        n, part = self.norm(x, f"{block}.norm_time"), f"{block}.time_mix"
        k, v, r = (
            self.times(self.mixed(n, self.of(part, f"mix_{name}"), restart), part, name)
            for name in ("key", "value", "receptance")
        )
        w = -torch.exp(self.of(part, "decay_base") + self.of(part, "decay_offset"))
        u = self.of(part, "bonus_base") + self.of(part, "bonus_offset")
        a, b, y = torch.zeros_like(w), torch.zeros_like(w), torch.empty_like(v)
        for t in range(T):
            if restart[t]:
                a, b = torch.zeros_like(w), torch.zeros_like(w)
            y[t] = (a + torch.exp(u + k[t]) * v[t]) / (b + torch.exp(u + k[t]))
            a = torch.exp(w) * a + torch.exp(k[t]) * v[t]
            b = torch.exp(w) * b + torch.exp(k[t])
        return x + self.times(torch.sigmoid(r) * y, part, "output")

    def channel_mix(self, x: Tensor, block: str, restart: Tensor) -> Tensor:
        n, part = self.norm(x, f"{block}.norm_channel"), f"{block}.channel_mix"
        k, r = (
            self.times(self.mixed(n, self.of(part, f"mix_{name}"), restart), part, name)
            for name in ("key", "receptance")
        )
        return x + torch.sigmoid(r) * self.times(torch.relu(k) ** 2, part, "value")

    def feed_forward(self, x: Tensor, norm: str, part: str) -> Tensor:
        return x + self.times(gelu(self.times(self.norm(x, norm), part, "up")), part, "down")

    def compress(self, h: Tensor, keep: Tensor) -> Tensor:
        part = "compressor"
        n = self.norm(h, f"{part}.norm_in")
        s = self.times(n, part, "salience")[:, 0].masked_fill(~keep, -10_000)
        tau = s.sort(descending=True, stable=True).indices[: self.count].sort().values
        q, k, v = (self.times(n, part, name) * keep[:, None] for name in ("query", "key", "record"))
        queries = self.of(part, "queries")
        d = (torch.arange(T) - tau[:, None]).abs()
        p = 0.94 * (d == 0) + 0.05 / 17 * (d <= 8) + 0.01 / T
        asked = (q[tau] + queries.reshape(self.count, -1)) @ k.T / math.sqrt(self.width)
        a = torch.exp(asked) * p * keep
        c = a / a.sum(-1, keepdim=True) @ v
        latents = self.feed_forward(c.reshape(M, D) + queries, f"{part}.norm_ff", f"{part}.ff")
        parts = self.norm(latents.reshape(self.count, -1), f"{part}.norm_out")
        return 2 * torch.sigmoid(s[tau])[:, None] * parts

    def compress_literally(self, h: Tensor, keep: Tensor) -> Tensor:
        part = "compressor"
        n, queries = self.norm(h, f"{part}.norm_in"), self.of(part, "queries")
        asking = self.of(part, "query.weight").unflatten(0, (H, -1))
        keys, values = self.of(part, "key_value.weight").unflatten(0, (2, H, -1))
        read = torch.empty(M, H, D // H, dtype=h.dtype)
        for m in range(M):
            for i in range(H):
                q, k, v = asking[i] @ queries[m], n[keep] @ keys[i].T, n[keep] @ values[i].T
                read[m, i] = (k @ q / math.sqrt(D // H)).softmax(-1) @ v
        latents = queries + self.times(read.flatten(1), part, "output")
        return self.norm(
            self.feed_forward(latents, f"{part}.norm_ff", f"{part}.ff"), f"{part}.norm_out"
        )

    def unfold(self, latents: Tensor, block: str) -> list[Tensor]:
        """What a block sees of a chunk for keys and for values: one row for each key."""
        if self.literal:
            return 2 * [latents]
        kind, number = block.split(".")
        views = self.of("compressor", "token.weight").unflatten(0, (-1, D))
        first = 2 * int(number) if kind == "dual-attention" else 0
        second = first + 1 if kind == "dual-attention" else 0
        return [latents @ views[view].T for view in (first, second)]

    def attend(
        self, x: Tensor, block: str, segments: Tensor, history: list[Tensor], gate: float
    ) -> Tensor:
        """`history`: latents, or sub-latents, of the chunks that may be seen, the newest first."""
        n, part = self.norm(x, f"{block}.norm_attention"), f"{block}.attention"
        queries = self.of(part, "query.weight").unflatten(0, (H, -1))
        keys, values = self.of(part, "key_value.weight").unflatten(0, (2, H, -1))
        betas = self.of(part, "age_bias").unflatten(0, (H, C))
        heads = []
        for h in range(H):
            q, ages = (n @ queries[h].T).tensor_split([D // H], dim=-1)
            ages = (ages + betas[h]).flip(-1)  # stored with the oldest first
            read = torch.empty(T, D // H, dtype=x.dtype)
            for t in range(T):
                own = [u for u in range(t + 1) if segments[u] == segments[t]]
                scores = n[own] @ keys[h].T @ q[t] / math.sqrt(D // H)
                values_read = n[own] @ values[h].T
                past, past_read = [scores[:0]], [values_read[:0]]
                for age, latents in enumerate(history if segments[t] == 0 else [], 1):
                    slots = self.of("slots", "slot")
                    for_keys, for_values = self.unfold(latents, block)
                    scored = (for_keys + slots) @ keys[h].T @ q[t] / math.sqrt(D // H)
                    past.append(scored + ages[t, age - 1] + math.log(gate))
                    past_read.append((for_values + slots) @ values[h].T)
                read[t] = self.joined(
                    (scores, values_read),
                    (torch.cat(past), torch.cat(past_read)),
                    self.reserve(n[t], part, h),
                    self.weights.get(f"{part}.joined", torch.zeros(())),
                )
            heads.append(read)
        x = x + self.times(torch.cat(heads, dim=-1), part, "output")
        return self.feed_forward(x, f"{block}.norm_ff", f"{block}.ff")

    def reserve(self, n: Tensor, part: str, head: int) -> Tensor | None:
        """r_h(x) of dual attention; None in a joint softmax."""
        if f"{part}.reserve.weight" not in self.weights:
            return None
        return n @ self.of(part, "reserve.weight")[head] + self.of(part, "reserve_bias")[head]

    @staticmethod
    def joined(
        own: tuple[Tensor, Tensor], past: tuple[Tensor, Tensor], reserve: Tensor | None, j: Tensor
    ) -> Tensor:
        """What is read by logits [S] of values [S, D/H]: of the chunk, and of history."""
        if reserve is None:
            return torch.cat([own[0], past[0]]).softmax(-1) @ torch.cat([own[1], past[1]])
        read = own[0].softmax(-1) @ own[1]
        if len(past[0]):
            odds = past[0].exp().sum() / own[0].exp().sum() / reserve.exp()
            p = odds / (1 + odds)
            read = (1 - j * p) * read + p * (past[0].softmax(-1) @ past[1])
        return read

    def logits(self, tokens: Tensor, depth: Tensor, gate: float) -> Tensor:
        """One lane: tokens [K, T], depth [K] -> [K, T, V]."""
        compressed: list[Tensor] = []
        compress = self.compress_literally if self.literal else self.compress
        found = []
        for chunk, reach in zip(tokens, depth.tolist(), strict=True):
            segments = (chunk == BOS).cumsum(0)
            restart = chunk == BOS
            restart[0] = True
            x = self.norm(self.of("embedding", "weight")[chunk], "norm_in")
            for block in self.blocks("rwkv"):
                x = self.channel_mix(self.time_mix(x, block, restart), block, restart)
            history = compressed[::-1][: min(reach, C)]
            compressed.append(compress(x, segments == segments[-1]))
            for block in self.blocks("attention") + self.blocks("dual-attention"):
                x = self.attend(x, block, segments, history, gate)
            found.append(self.norm(x, "norm_out") @ self.of("head", "weight").T)
        return torch.stack(found)


@each_variant
@given(seed=st.integers(0, 2**31), gate=st.sampled_from([1.0, 0.3]))
@settings(max_examples=3, deadline=None)
@torch.no_grad()
def test_the_model_is_what_its_document_says(
    changes: dict[str, str], seed: int, gate: float
) -> None:
    model = build(**changes)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn_like(parameter))  # the vectors, too
    tokens = stream(seed, 5, T, SMALL["vocab_size"], mean_document=25)
    written = Written({**dict(model.named_parameters()), **dict(model.named_buffers())})
    wanted = written.logits(tokens[0], depth_of(tokens)[0], gate)
    torch.testing.assert_close(logits(model, tokens, gate)[0], wanted, rtol=1e-5, atol=1e-5)
