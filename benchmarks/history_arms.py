"""The arms of benchmarks/history.py: what stands where i3-4096ctx has its compressor.

Letters: N chunks, T tokens, M latents, S = T / M tokens of a latent's span, D width, H heads.

  none        no history
  literal     the card's compressor: learned queries read the whole chunk
  anchored    queries are learned + the mean of their span of S tokens, which stays in the latent
  span        anchored, and attention begins with its own span: a learned bonus there per head
  span-kv     span, and history has key and value projections of its own in every attention block
  mean        means of the spans, normalised: no compressor
  mean-kv     mean, and projections of its own
  detached    literal, trained by nothing
  ceiling     no compression: every token of the last 4,096
  carry       no history, RWKV state carried from chunk to chunk
  span-carry  span, and RWKV state carried
"""

from collections.abc import Callable

import torch
from i3_steps import WithoutHistory
from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.model.attention import Attention, HistoryEmbedding
from i3dist.model.compress import Compressor
from i3dist.model.layers import Channels, LayerNorm, Linear, merge_heads, split_heads
from i3dist.model.lm import I3LM

OWN_SPAN = 4.0  # first bonus on the logits of a latent's own span
OWN_PART, OWN_SPAN_REST = 0.8, 0.15  # attention of a staggered head to its part and its span


def span_means(x: Tensor, keep: Tensor, latents: int) -> Tensor:
    """Means over each span's kept positions, 0 where there are none: x [N, T, D] -> [N, M, D]."""
    spans = (x * keep.unsqueeze(-1)).unflatten(1, (latents, -1)).sum(2)
    return spans / keep.unflatten(1, (latents, -1)).sum(2).clamp(min=1).unsqueeze(-1)


class Uncompressed(nn.Module):
    """Every kept position, normalised: M = T."""

    def __init__(self, width: Channels):
        super().__init__()
        self.norm = LayerNorm(width)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """hidden [N, T, D], keep [N, T] -> [N, T, D]."""
        return self.norm(hidden) * keep.unsqueeze(-1)


class MeanPool(nn.Module):
    """The means of the spans, normalised."""

    def __init__(self, width: Channels, latents: int):
        super().__init__()
        self.latents = latents
        self.norm = LayerNorm(width)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """hidden [N, T, D], keep [N, T] -> [N, M, D]."""
        return self.norm(span_means(hidden, keep, self.latents))


class Detached(nn.Module):
    """A compressor left as it began."""

    def __init__(self, compressor: nn.Module):
        super().__init__()
        self.inner = compressor

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As the compressor's, without gradient."""
        return self.inner(hidden, keep).detach()


class Anchored(Compressor):
    """Queries that start from the mean of their span."""

    def __init__(self, width: Channels, heads: int, mult: int, latents: int, bonus: float | None):
        super().__init__(width, heads, mult, latents)
        self.bonus = None if bonus is None else nn.Parameter(torch.full((self.heads,), bonus))

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As `Compressor.forward`."""
        normed = self.norm_in(hidden)
        queries = self.width.pad(self.queries)
        queries = queries + span_means(normed, keep, len(queries))  # [N, M, D]
        key, value = self.key_value(normed).chunk(2, dim=-1)
        query, key, value = (
            split_heads(part, self.heads) for part in (self.query(queries), key, value)
        )
        logits = ((query * self.scale) @ key.transpose(-1, -2)).float()  # [N, H, M, T]
        if self.bonus is not None:
            logits = logits + self.bonus.float()[:, None, None] * self._own_span(logits)
        weights = logits.masked_fill(~keep[:, None, None], float("-inf")).softmax(-1)
        latents = queries + self.output(merge_heads(weights.to(value.dtype) @ value))
        return self.norm_out(latents + self.ff(self.norm_ff(latents)))

    @staticmethod
    def _own_span(logits: Tensor) -> Tensor:
        """Which tokens are of which latent's span: [M, T] as 0 and 1."""
        latents, tokens = logits.shape[-2:]
        of = torch.arange(tokens, device=logits.device) // (tokens // latents)
        return (of == torch.arange(latents, device=logits.device)[:, None]).to(logits.dtype)


class Staggered(Compressor):
    """Latents that read their own span, each head first another part of it.

    Content decides from there: a learned table of logits, by head and position in the span, begins
    as the logarithm of where a head is to look.
    """

    def __init__(
        self, width: Channels, heads: int, mult: int, latents: int, length: int, anchor: bool
    ):
        super().__init__(width, heads, mult, latents)
        self.anchor, self.span, self.length = anchor, length // latents, length
        part = self.span / self.heads
        place = torch.arange(self.span) + 0.5
        begin = torch.arange(self.heads)[:, None] * part
        overlap = (
            torch.minimum(place + 0.5, begin + part) - torch.maximum(place - 0.5, begin)
        ).clamp(min=0)
        inside = OWN_PART * overlap / part + OWN_SPAN_REST / self.span
        outside = (1 - OWN_PART - OWN_SPAN_REST) / (length - self.span)
        self.register_buffer("prior", (inside / outside).log().float())  # [H, S]
        self.offset = nn.Parameter(torch.zeros(self.heads * self.span))
        self.write = self.output
        del self.output

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As `Compressor.forward`."""
        normed = self.norm_in(hidden)
        queries = self.width.pad(self.queries)
        means = span_means(normed, keep, len(queries))  # [N, M, D]
        key, value = self.key_value(normed).chunk(2, dim=-1)
        query, key, value = (
            split_heads(part, self.heads) for part in (self.query(queries + means), key, value)
        )
        logits = ((query * self.scale) @ key.transpose(-1, -2)).float()  # [N, H, M, T]
        logits = logits + self._bias(len(queries))
        weights = logits.masked_fill(~keep[:, None, None], float("-inf")).softmax(-1)
        start = queries + means if self.anchor else queries
        latents = start + self.write(merge_heads(weights.to(value.dtype) @ value))
        return self.norm_out(latents + self.ff(self.norm_ff(latents)))

    def _bias(self, latents: int) -> Tensor:
        """[H, M, T]: the table on each latent's own span, 0 elsewhere."""
        table = self.prior + self.offset.float().view_as(self.prior)  # [H, S]
        eye = torch.eye(latents, device=table.device)
        return (eye[None, :, :, None] * table[:, None, None, :]).flatten(2)


class Slots(Compressor):
    """Each latent is R slots of D/R channels: tokens of its span, projected.

    A slot begins with the mean of an R-th of the span; content decides from there.
    """

    def __init__(self, width: Channels, mult: int, latents: int, length: int, slots: int):
        super().__init__(width, slots, mult, latents)
        self.span = length // latents
        part = self.span / self.heads
        place, begin = torch.arange(self.span), torch.arange(self.heads)[:, None] * part
        overlap = torch.minimum(place + 1, begin + part) - torch.maximum(place, begin)
        inside = 0.97 * overlap.clamp(min=0) / part + 0.02 / self.span
        self.register_buffer("prior", (inside * (length - self.span) / 0.01).log())  # [R, S]
        self.offset = nn.Parameter(torch.zeros(self.heads * self.span))
        del self.output

    def begin(self) -> None:
        """Slots hold orthonormal projections of tokens."""
        d = self.width.stored
        for rows in self.key_value.weight[d:].chunk(self.heads):
            nn.init.orthogonal_(rows)

    def forward(self, hidden: Tensor, keep: Tensor) -> Tensor:
        """As `Compressor.forward`."""
        normed = self.norm_in(hidden)
        queries = self.width.pad(self.queries)
        key, value = self.key_value(normed).chunk(2, dim=-1)
        query = self.query(queries + span_means(normed, keep, len(queries)))
        query, key, value = (split_heads(part, self.heads) for part in (query, key, value))
        logits = ((query * self.scale) @ key.transpose(-1, -2)).float()  # [N, R, M, T]
        table = self.prior + self.offset.float().view_as(self.prior)
        eye = torch.eye(len(queries), device=table.device)
        logits = logits + (eye[None, :, :, None] * table[:, None, None, :]).flatten(2)
        weights = logits.masked_fill(~keep[:, None, None], float("-inf")).softmax(-1)
        read = self.query.d_out.trim(merge_heads(weights.to(value.dtype) @ value))
        latents = queries + self.width.pad(read)
        return self.norm_out(latents + self.ff(self.norm_ff(latents)))


class Unfolding(I3LM):
    """Attention sees R vectors for each latent, and projects them as it does tokens."""

    def __init__(self, settings: ModelSettings, bos_id: int, slots: int):
        super().__init__(settings, bos_id)
        s, width = settings, self.width
        self.compressor = Slots(width, s.ff_mult, s.latents, s.chunk_length, slots)  # type: ignore[assignment]
        self.slots = self.compressor.heads
        self.keys_per_chunk = s.latents * self.slots
        self.history = HistoryEmbedding(width, s.history_chunks, self.keys_per_chunk)
        self.unfold = Linear(width, width.times(self.slots))

    def begin(self) -> None:
        """Unfold a slot to the token that it was projected from."""
        d = self.width.stored
        nn.init.zeros_(self.unfold.weight)
        places = self.unfold.weight.view(self.slots, d, self.slots, d // self.slots)
        compressor = getattr(self.compressor, "inner", self.compressor)
        for i, rows in enumerate(compressor.key_value.weight[d:].chunk(self.slots)):
            places[i, :, i] = rows.T * self.slots**0.5

    def history_keys_values(self, latents: Tensor) -> list[tuple[Tensor, Tensor]]:
        """As `I3LM.history_keys_values`."""
        each = self.unfold(latents).unflatten(-1, (self.slots, -1)).flatten(2, 3)
        return super().history_keys_values(each)


class Reads(Attention):
    """Attention that projects latents by matrices of their own, to R keys and values each."""

    def __init__(self, width: Channels, heads: int, reads: int):
        super().__init__(width, heads)
        self.reads = reads
        self.latent_key_value = Linear(width, width.times(2 * reads).split(2 * reads * self.heads))

    def history_keys_values(self, latents: Tensor, embed) -> tuple[Tensor, Tensor]:
        """As `Attention.history_keys_values`, with R * M in place of M."""
        chunks, width = embed.age.shape[0], embed.width
        projected = self.latent_key_value(latents + width.pad(embed.slot))
        count = latents.shape[1] - chunks
        windows = torch.stack([projected[:, i : i + count] for i in range(chunks)], dim=2)
        windows = windows + self.latent_key_value(width.pad(embed.age))[:, None]
        each = windows.unflatten(-1, (self.reads, -1)).flatten(2, 4)  # [B, K, C * M * R, 2D]
        key, value = each.chunk(2, dim=-1)
        return split_heads(key, self.heads), split_heads(value, self.heads)


Change = Callable[[I3LM], None]


def anchored(bonus: float | None) -> Change:
    """The compressor anchored."""

    def change(model: I3LM) -> None:
        s = model.settings
        model.compressor = Anchored(model.width, s.heads, s.ff_mult, s.latents, bonus)  # type: ignore[assignment]

    return change


def mean_pool(model: I3LM) -> None:
    """Means in place of the compressor."""
    model.compressor = MeanPool(model.width, model.settings.latents)  # type: ignore[assignment]


def detached(model: I3LM) -> None:
    """The compressor, not trained."""
    model.compressor = Detached(model.compressor)  # type: ignore[assignment]


def uncompressed(model: I3LM) -> None:
    """All tokens in place of latents."""
    model.compressor = Uncompressed(model.width)  # type: ignore[assignment]


def staggered(anchor: bool, heads: int | None = None) -> Change:
    """The compressor staggered."""

    def change(model: I3LM) -> None:
        s = model.settings
        model.compressor = Staggered(  # type: ignore[assignment]
            model.width, heads or s.heads, s.ff_mult, s.latents, s.chunk_length, anchor
        )

    return change


def own_projections(reads: int) -> Change:
    """Projections of its own for history in every attention block."""

    def change(model: I3LM) -> None:
        model.keys_per_chunk *= reads
        for block in model.attention:
            block.attention = Reads(model.width, model.settings.heads, reads)

    return change


CHANGES: dict[str, tuple[Change, ...]] = {
    "none": (),
    "literal": (),
    "anchored": (anchored(None),),
    "span": (anchored(OWN_SPAN),),
    "span-kv": (anchored(OWN_SPAN), own_projections(1)),
    "mean": (mean_pool,),
    "mean-kv": (mean_pool, own_projections(1)),
    "mean-kv4": (mean_pool, own_projections(4)),
    "stagger": (staggered(True),),
    "stagger-kv": (staggered(True), own_projections(1)),
    "stagger-kv4": (staggered(True), own_projections(4)),
    "slots-kv4": (staggered(False), own_projections(4)),
    "stagger16-kv4": (staggered(True, 16), own_projections(4)),
    "stagger-kv4-carry": (staggered(True), own_projections(4)),
    "stagger-kv4-detached": (staggered(True), own_projections(4), detached),
    "slots1": (),
    "slots4": (),
    "slots4-drop": (),
    "slots4-detached": (detached,),
    "slots8": (),
    "slots16": (),
    "detached": (detached,),
    "ceiling": (uncompressed,),
    "carry": (),
    "span-carry": (anchored(OWN_SPAN),),
}
SLOTS = {
    "slots1": 1,
    "slots4": 4,
    "slots4-drop": 4,
    "slots4-detached": 4,
    "slots8": 8,
    "slots16": 16,
}
WITHOUT = ("none", "carry")  # arms without history


def build(arm: str, settings: ModelSettings, bos_id: int, seed: int) -> I3LM:
    """The model of an arm. What arms of a seed have in common begins with the same weights, up to
    the first part that differs in shape."""
    changes: dict[str, object] = {"state_carry": arm.endswith("carry")}
    if arm == "ceiling":
        changes["latents"] = settings.chunk_length
    torch.manual_seed(seed)
    changed = settings.model_copy(update=changes)
    if arm in SLOTS:
        model: I3LM = Unfolding(changed, bos_id, SLOTS[arm])
    else:
        model = (WithoutHistory if arm in WITHOUT else I3LM)(changed, bos_id)
    for change in CHANGES[arm]:
        change(model)
    # Replaced parts begin as the model's own do.
    torch.manual_seed(seed)
    model._initialise()
    with torch.no_grad():
        for module in reversed(list(model.modules())):  # parts before the whole
            if hasattr(module, "begin"):
                module.begin()
    return model
