"""Decoding of many rows at once, in constant memory.

Notation: B rows, G rows whose chunk is full, T tokens of a chunk, C history chunks, M latents, D
width, V vocabulary.
"""

from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor

from i3dist.inference.closing import RecordsClosing
from i3dist.inference.layout import laid_out
from i3dist.inference.place import Place
from i3dist.inference.prompt import Prompt, read_above, read_prompt
from i3dist.inference.recording import Recorded
from i3dist.inference.steps import (
    STEPS,
    AttentionStep,
    LatentStep,
    LowerStep,
    RwkvStep,
    Sight,
    UpperStep,
    compile_if,
    in_order,
    step_kernels,
    upper_step,
)
from i3dist.model.compressor_records import RecordsCompressor
from i3dist.model.lm import I3LM
from i3dist.ops.shift_mix import has_kernels


class BatchDecoder:
    """Reads B streams token by token, and predicts what follows in each.

    Each row has its own place in its chunk, its own document and history. All that it remembers is
    in buffers of fixed size on the device. `forward` changes them in place: it is the same kernels
    for every token, and waits for nothing. The host counts the tokens of each row's chunk, so it
    knows without asking when a chunk is full and must be compressed.

    Each row's results are those of `Decoder`, the oracle, up to rounding.
    """

    @torch.no_grad()
    def __init__(self, model: I3LM, prompts: Sequence[Tensor], compiled: bool = False):
        """Read the prompts.

        Args:
            model: stays as it is.
            prompts: one for each row, [L] int64 with L >= 1, on the model's device.
            compiled: whether to compile what is no kernel of a step.
        """
        self.model = model = laid_out(model)
        self.compiled = compiled
        read = [read_prompt(model, prompt) for prompt in prompts]
        self.logits = torch.stack([row.logits for row in read])
        """After the prompts, [B, V] fp32."""
        self.latents = torch.cat([row.latents for row in read])
        """[B, C, M, D], chunks as a ring, whose oldest is at `place.oldest`."""
        self.filled = [len(row.segments) for row in read]  # tokens in each row's chunk
        self.place = Place.after(read)
        self.hidden = self.latents.new_zeros(
            len(read), model.settings.chunk_length, model.width.computed
        )
        for row, prompt in zip(self.hidden, read, strict=True):
            row[: prompt.hidden.shape[1]] = prompt.hidden[0]
        # Other kinds may wait for the device, which a recording cannot.
        built_in = {type(block) for block in (*model.lower, *model.upper)} <= STEPS.keys()
        self.recorded = self.logits.is_cuda and built_in
        self.by_kernels = has_kernels(self.hidden) and built_in
        self._add_steps(read)
        self.closing: dict[int, tuple[Tensor, Recorded]] = {}  # by number of rows

    def _add_steps(self, read: Sequence[Prompt]) -> None:
        model = self.model
        states = zip(*(row.states for row in read), strict=True)
        own = zip(*(row.own for row in read), strict=True)
        self.lower: list[LowerStep] = [
            STEPS.get(type(block), LowerStep)(block, rows)
            for block, rows in zip(model.lower, states, strict=True)
        ]
        self.upper: list[UpperStep] = [
            upper_step(block, model, self.latents, self.by_kernels)(
                block, model, views, rows, self.latents
            )
            for block, views, rows in zip(model.upper, model.stack.views, own, strict=True)
        ]
        steps: tuple[LowerStep | UpperStep, ...] = (*self.lower, *self.upper)
        for step in steps:
            step.compiled = self.compiled
        # Layers read the same sub-latents.
        reading = [step for step in self.upper if isinstance(step, LatentStep)]
        self.sub_latents = reading[0].latents if reading else None
        for step in reading:
            step.latents = self.sub_latents
        compressor, self.records = model.compressor, None
        if self.by_kernels and type(compressor) is RecordsCompressor:
            self.records = RecordsClosing(compressor, model.settings.chunk_length)

    @torch.no_grad()
    def feed(self, tokens: Tensor) -> Tensor:
        """Read a token of each row, [B] int64: the logits after it, [B, V] fp32."""
        self.make_room()
        return self.forward(tokens)

    @torch.no_grad()
    def read(self, tokens: Tensor) -> Tensor:
        """Read more of the only row, chunk by chunk: what `feed` does token by token.

        Args:
            tokens: [L] int64 with L >= 1, the document's next: ``<BOS>`` is not among them.

        Returns:
            The logits after the last one, [1, V] fp32.
        """
        (filled,), length = self.filled, self.hidden.shape[1]
        x = self.hidden
        while len(tokens):
            if filled == length:
                self._close([0])
                filled = 0
            new, tokens = tokens.tensor_split([length - filled])
            x = self._extend(new, filled)
            filled += len(new)
        self.filled = [filled]
        return predict(self.model, x[:, -1])

    def _extend(self, tokens: Tensor, start: int) -> Tensor:
        """Read tokens [n] of the only row, whose chunk has `start` before: their residual stream
        [1, n, D]."""
        model, place = self.model, self.place
        restart = torch.zeros_like(tokens, dtype=torch.bool).unsqueeze(0)
        restart[:, 0] = start == 0 and not model.settings.state_carry
        states = [step.state for step in self.lower]
        x, after = model.run_lower(model.embed(tokens.unsqueeze(0)), restart, states)
        for step, state in zip(self.lower, after, strict=True):
            for part, new in zip(step.state, state, strict=True):
                part.copy_(new)
        self.hidden[:, start : start + len(tokens)] = x
        order = torch.arange(start + len(tokens), device=tokens.device)
        segments = torch.where(order >= place.start, place.opened.int(), -1).unsqueeze(0)
        before = [step.chunk(start) for step in self.upper]
        latents, depth = in_order(self.latents, place.oldest), place.depth.unsqueeze(1)
        x, joined = read_above(model, x, latents, segments, depth, before)
        for upper, keys_values in zip(self.upper, joined, strict=True):
            upper.extend(keys_values, start)
        place.position.fill_(len(order))
        return x

    def make_room(self) -> None:
        """Close the chunks that are full, and count the token that each row reads next."""
        length = self.hidden.shape[1]
        full = [row for row, filled in enumerate(self.filled) if filled == length]
        if full:
            self._close(full)
        self.filled = [filled % length + 1 for filled in self.filled]

    def forward(self, tokens: Tensor) -> Tensor:
        """The rest of `feed`, which runs on the device alone."""
        if self.by_kernels:
            return self._by_kernels(tokens)
        x, restart, sight = compile_if(self.compiled, enter)(self.model, self.place, tokens)
        for lower in self.lower:
            x = lower(x, restart)
        self.hidden[torch.arange(len(x), device=x.device), sight.position] = x
        for upper in self.upper:
            x = upper(x, sight)
        self.place.position.add_(1)
        return compile_if(self.compiled, predict)(self.model, x)

    def _by_kernels(self, tokens: Tensor) -> Tensor:
        """`forward` by Triton kernels."""
        model, place = self.model, self.place
        begin = step_kernels("token_triton")
        table, norm = model.embedding.weight, model.norm_in.padded()
        carry = model.settings.state_carry
        x, restart = begin.enter(tokens, table, norm, place, model.bos_id, carry)
        layers = step_kernels("step_triton")
        stream = layers.Residual(x)
        for lower in self.lower:
            assert isinstance(lower, RwkvStep)
            stream = lower.by_kernels(stream, restart)
        stream = layers.Residual(layers.join(stream))
        begin.keep(stream.x, self.hidden, place.position)
        for upper in self.upper:
            assert isinstance(upper, AttentionStep)
            stream = upper.by_kernels(stream, place)
        norm, head = model.norm_out.padded(), model.head.weight
        _, logits = layers.normed_product(stream, norm, head, dtype=torch.float32)
        return cast("Tensor", logits)

    def _close(self, full: list[int]) -> None:
        """Compress the chunks of some rows into their history.

        Work grows with the rows that are full, and few are at once unless they began together. So
        there is a recording for each power of two of rows, which may name a row twice.
        """
        count = min(1 << (len(full) - 1).bit_length(), len(self.filled))
        if count not in self.closing:
            rows = torch.zeros(count, dtype=torch.int64, device=self.hidden.device)
            self.closing[count] = rows, Recorded(self.recorded)
        rows, recorded = self.closing[count]
        named = torch.tensor(full + full[:1] * (count - len(full)))
        rows.copy_(named, non_blocking=True)
        recorded(partial(self._compress, rows))

    @torch.no_grad()
    def _compress(self, rows: Tensor) -> None:
        """The part of `_close` that runs on the device, for rows [G] int64."""
        place, slot = self.place, self.place.oldest[rows]
        if self.records is not None:
            self.records(self.hidden, rows, place, self.latents, self.sub_latents)
        else:
            self._by_compressor(rows, slot)
        for step in self.upper:
            step.remember(rows, self.latents, slot)
        if self.by_kernels:
            step_kernels("close_triton").begin(rows, place, self.latents.shape[1])
        else:
            place.close(rows, self.latents.shape[1])

    def _by_compressor(self, rows: Tensor, slot: Tensor) -> None:
        """Compress the chunks of rows [G] by the compressor's own `forward`, into slots [G]."""
        order = torch.arange(self.hidden.shape[1], device=rows.device)
        keep = order >= self.place.start[rows].unsqueeze(-1)
        compressor = self.model.compressor
        compress = compile_if(self.compiled, type(compressor).forward)
        self.latents[rows, slot] = new = compress(compressor, self.hidden[rows], keep)
        if self.sub_latents is not None:
            self.sub_latents[rows, slot] = compressor.split(new)


def enter(model: I3LM, place: Place, tokens: Tensor) -> tuple[Tensor, Tensor, Sight]:
    """Place tokens [B] in their documents: the residual stream's start [B, D], whether recurrent
    state restarts [B] bool, and what each token sees."""
    position, begins = place.position, tokens == model.bos_id
    place.start.copy_(torch.where(begins, position, place.start))
    place.opened.logical_or_(begins)
    first = position == 0
    if model.settings.state_carry:
        first = first & (place.depth == 0)
    length, chunks = model.settings.chunk_length, model.settings.history_chunks
    order = torch.arange(length, device=tokens.device)
    own = (order >= place.start.unsqueeze(-1)) & (order <= position.unsqueeze(-1))
    number = torch.arange(chunks, device=tokens.device)
    past = ~place.opened.unsqueeze(-1) & (chunks - number <= place.depth.unsqueeze(-1))
    slots = (number - place.oldest.unsqueeze(-1)) % chunks
    return model.embed(tokens), begins | first, Sight(position, own, past, slots)


def predict(model: I3LM, x: Tensor) -> Tensor:
    """The residual stream's end [B, D] -> logits [B, V] fp32."""
    return model.head(model.norm_out(x)).float()
