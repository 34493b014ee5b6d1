"""The i3 language model. Notation: B lanes, K chunks of a window, T tokens, C history chunks,
M latents, D width, V vocabulary.

Layers that see no history, RWKV by default, stand below; the compressor reads their output. So a
chunk's latents do not depend on history, and the K chunks of a window run side by side. The layers
above, attention, then see each chunk's own tokens and the latents of the C chunks before it.
"""

from collections.abc import Callable, Mapping, Sequence
from types import MethodType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from i3dist.config import ModelSettings
from i3dist.errors import UserError
from i3dist.model.attention import Slots, window_bias
from i3dist.model.block import Block, HistoryBlock, LayerState, LowerBlock, Place, Project
from i3dist.model.compressor import Compressor
from i3dist.model.compressor_kinds import COMPRESSORS
from i3dist.model.layer_kinds import LAYER_KINDS, Layer, Stack
from i3dist.model.layers import ALIGNMENT, Channels, LayerNorm, Linear
from i3dist.model.segments import chunks_seen, last_segment, restarts, segment_ids
from i3dist.model.state import LaneState, empty_states, stack_states, unstack_states
from i3dist.ops.attention import KeysValues, Window
from i3dist.ops.compiled import Compiled
from i3dist.ops.cross_entropy import token_losses

# Names of parts that a layer kind cannot have, beside attributes of every module.
RESERVED = {"compressor", "slots", "lower", "upper", "norm_out", "head", "norms"}
# Rows are aligned already; with more padding our operators would copy their inputs.
# Timing two variants of each pointwise kernel takes 3 s of a first start, and trains no faster.
OPTIONS = {"comprehensive_padding": False, "triton.autotune_pointwise": False}


class Below(NamedTuple):
    """A window below history: what the upper layers start from. A lane is a row of each part."""

    x: Tensor  # [B, K, T, D] residual stream after the lower layers
    segments: Tensor  # [B, K, T]
    depth: Tensor  # [B, K] chunks before each that belong to the document it continues
    latents: Tensor  # [B, C + K, M, D], of C chunks before the window and its own, oldest first


class I3LM(nn.Module):
    """Lower layers, a compressor beside them, upper layers that see history, an untied head."""

    def __init__(self, settings: ModelSettings, bos_id: int, alignment: int = ALIGNMENT):
        """Build the model.

        Args:
            settings: the architecture.
            bos_id: the token that opens a document.
            alignment: channels are padded to a multiple of it; changes nothing but rounding.

        Raises:
            UserError: `settings.layers` is no stack that can be built, or there is no such
                compressor.
        """
        super().__init__()
        self.settings = settings
        self.bos_id = bos_id
        self.width = width = Channels(settings.d_model, alignment=alignment)
        self.stack = Stack.of(settings)
        self.compiled = False
        self.joined = 0.0
        """The share j of `join_softmaxes`."""
        self.embedding = nn.Embedding(settings.vocab, width.stored)
        self.norm_in = LayerNorm(width)
        self.lower = cast("list[LowerBlock]", self._add(self.stack.lower))
        self.compressor = COMPRESSORS.of(settings.compressor)(settings, width)
        self.slots = Slots(width, self.keys_per_chunk)
        self.upper = cast("list[HistoryBlock]", self._add(self.stack.upper))
        self.norm_out = LayerNorm(width)
        # The vocabulary is not padded: a padded logit would take part in the softmax.
        self.head = Linear(width, Channels(settings.vocab, alignment=1))
        self._calls = CALLS
        self.reset_parameters()

    def _add(self, layers: list[Layer]) -> list[Block]:
        """Build the blocks of layers. Each is a submodule KIND.NTH, as in checkpoints."""
        blocks = []
        for kind, nth, total in layers:
            if kind in RESERVED or (nth == 0 and hasattr(self, kind)):
                raise UserError(f"the model uses the name {kind!r}: call the layer kind otherwise")
            if nth == 0:
                self.add_module(kind, nn.ModuleList())
            block = LAYER_KINDS.of(kind)(Place(self.settings, self.width, nth, total))
            cast("nn.ModuleList", self.get_submodule(kind)).append(block)
            blocks.append(block)
        return blocks

    @property
    def keys_per_chunk(self) -> int:
        """Keys by which attention sees an earlier chunk."""
        return self.settings.latents * self.compressor.sub_latents

    def compile_blocks(self) -> None:
        """Compile block by block: all blocks of a kind share one compilation."""
        self.compiled = True
        parts: tuple[nn.Module, ...] = (*self.lower, *self.upper, self.compressor)
        kinds: set[Any] = set(map(type, parts))
        forwards = {kind: Compiled(kind.forward, **OPTIONS) for kind in kinds}
        for part in parts:
            part.forward = MethodType(forwards[type(part)], part)
        self._calls = Calls(*(Compiled(call, **OPTIONS) for call in self._calls))

    def compile_nothing(self) -> None:
        """Undo `compile_blocks`."""
        self.compiled = False
        for part in (*self.lower, *self.upper, self.compressor):
            vars(part).pop("forward", None)
        self._calls = CALLS

    def join_softmaxes(self, share: float) -> None:
        """Make the two softmaxes of layers that have two into one, to a share j.

        A model that was never told computes nothing for it, so call this before compiling or
        recording, with 0 if need be. From then on a call changes a tensor in place.

        Args:
            share: j, from 0, as without, to 1, one softmax.
        """
        self.joined = share
        for block in self.upper:
            block.join_softmaxes(share)

    def forward(
        self, tokens: Tensor, targets: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        """Cross-entropy of every position, and the lanes' state after the window.

        Args:
            tokens: [B, K, T] int64.
            targets: [B, K, T] int64, `IGNORE` where nothing is predicted.
            depth: [B, K] int, how many chunks before each belong to the document it continues.
            state: what the lanes remember.
            gate: scalar g in [0, 1] of history.

        Returns:
            Losses [B, K, T] fp32 in nats, 0 where the target is `IGNORE`; the new, detached state.
        """
        below, state = self.below(tokens, depth, state)
        return self.losses(self.above(below, gate), targets), state

    def losses(self, x: Tensor, targets: Tensor) -> Tensor:
        """Cross-entropy [B, K, T] of the blocks' output [B, K, T, D]."""
        return self._calls.losses(self.norm_out, self.head, x, targets)

    def below(self, tokens: Tensor, depth: Tensor, state: LaneState) -> tuple[Below, LaneState]:
        """The part of `forward` that sees no history: lower layers and compressor.

        Args:
            tokens: [B, K, T] int64.
            depth: [B, K] int, as for `forward`.
            state: what the lanes remember.

        Returns:
            The input of `above`, and the new, detached state.
        """
        segments = segment_ids(tokens, self.bos_id)
        x, carried = self.run_window(tokens, depth, state.layers)
        new = self.compressor(x.flatten(0, 1), last_segment(segments).flatten(0, 1))
        new = new.unflatten(0, tokens.shape[:2])
        latents = torch.cat([self.width.pad(state.latents), new], dim=1)
        newest = self.width.trim(latents[:, -self.settings.history_chunks :])
        return Below(x, segments, depth, latents), LaneState(newest, carried).map(Tensor.detach)

    def above(self, below: Below, gate: Tensor) -> Tensor:
        """The rest: the upper layers. Returns the residual stream [B, K, T, D].

        One `below` serves several calls, with another gate (a scalar in [0, 1]) or with other
        latents in it.
        """
        x, segments, depth, latents = below
        chunks = self.settings.history_chunks
        window = Window(segments, depth, chunks, self.keys_per_chunk)
        kinds = {type(block) for block in self.upper}
        if self.compiled and segments.is_cuda:
            visible = {kind: kind.fused_visibility(window, gate) for kind in kinds}
        else:
            visible = dict.fromkeys(kinds, window_bias(window, gate))
        seen = chunks_seen(segments, depth, chunks, gate)
        for block, past in zip(self.upper, self.history(latents, seen), strict=True):
            x, _ = block(x, past, None, visible[type(block)])
        return x

    def run_window(
        self, tokens: Tensor, depth: Tensor, carried: dict[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The lower layers over a window: its chunks are independent rows, or one sequence per lane
        where state is carried. Returns x [B, K, T, D] and the carried state after it."""
        carry = self.settings.state_carry
        restart = restarts(tokens, depth, self.bos_id, carry)
        x = self.embed(tokens)
        first = 1 if carry else 0  # of the two dimensions that become one
        rows, restart = x.flatten(first, first + 1), restart.flatten(first, first + 1)
        if not carry:
            return self.run_lower(rows, restart)[0].view_as(x), carried
        pad, trim, layers = self.width.pad, self.width.trim, self.stack.lower
        padded = {name: pad(part) for name, part in carried.items()}
        y, after = self.run_lower(rows, restart, unstack_states(layers, padded))
        stacked = stack_states(layers, after)
        return y.view_as(x), {name: trim(part) for name, part in stacked.items()}

    def run_lower(
        self, x: Tensor, restart: Tensor, states: list[LayerState] | None = None
    ) -> tuple[Tensor, list[LayerState]]:
        """The lower layers on N independent sequences: x [N, T, D], restart [N, T].

        Args:
            x: the residual stream.
            restart: where state is emptied before the token.
            states: of each layer, on computed channels; None is empty.
        """
        if states is None:
            states = empty_states(self.stack.lower, len(x), self.width.computed, x)
        after = []
        for block, state in zip(self.lower, states, strict=True):
            x, state = block(x, restart, state)
            after.append(state)
        return x, after

    def embed(self, tokens: Tensor) -> Tensor:
        """Token ids -> the residual stream's start, [..., D].

        The lookup is never compiled: a compiler would sum its gradient by atomic additions in bf16,
        in another order every time.
        """
        return self._calls.start(self.norm_in, self.embedding(tokens))

    def history(self, latents: Tensor, seen: Tensor) -> list[KeysValues]:
        """What each upper layer sees of history: latents [B, C + K, M, D] ->
        [B, (C + K) * keys_per_chunk, D] per layer.

        Args:
            latents: of chunks, oldest first.
            seen: [B, C + K] bool, from `chunks_seen`. The others count as 0: attention gives them
                no weight, but 0 times NaN is NaN.
        """
        return self._calls.history(
            self.compressor, self.slots, self.upper, self.stack.views, latents, seen
        )

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Initialize all matrices, then what the blocks and the compressor initialize otherwise.

        Normal with deviation sqrt(2 / 5D), 0.018 at the default width ("SmallInit": Nguyen &
        Salazar, 2019, arXiv:1910.05895). The deviation of projections that end a residual branch is
        divided by the root of the number of branches, two a layer (GPT-2: Radford et al., 2019).
        """
        if self.head.weight.is_meta:
            return
        std = (0.4 / self.width.stored) ** 0.5
        branches = 2 * (len(self.lower) + len(self.upper))
        ends = (".output.weight", "channel_mix.value.weight", ".down.weight")
        for name, parameter in self.named_parameters():
            if parameter.ndim < 2:
                continue
            nn.init.normal_(parameter, std=std / branches**0.5 if name.endswith(ends) else std)
        parts: tuple[Block | Compressor, ...] = (*self.lower, self.compressor, *self.upper)
        for part in parts:
            part.reset_parameters()


def _start(norm: LayerNorm, embedded: Tensor) -> Tensor:
    """`I3LM.embed` after the lookup: [..., stored] -> [..., D]."""
    return norm(norm.channels.pad(embedded))


def _losses(norm: LayerNorm, head: Linear, x: Tensor, targets: Tensor) -> Tensor:
    """See `I3LM.losses`."""
    return token_losses(norm(x), head.computed(head.weight), targets)


def _history(
    compressor: Compressor,
    slots: Slots,
    upper: list[HistoryBlock],
    views: list[range],
    latents: Tensor,
    seen: Tensor,
) -> list[KeysValues]:
    """See `I3LM.history`."""
    latents = torch.where(seen[..., None, None], latents, 0.0)

    def seen_by(views: range) -> Project:
        def project(weight: Tensor, view: int = 0) -> Tensor:
            return compressor.project(latents, weight, views[view]) + slots.project(weight)

        return project

    return [block.history(seen_by(own)) for block, own in zip(upper, views, strict=True)]


class Calls(NamedTuple):
    """What is compiled beside whole blocks."""

    start: Callable[[LayerNorm, Tensor], Tensor]
    losses: Callable[[LayerNorm, Linear, Tensor, Tensor], Tensor]
    history: Callable[..., list[KeysValues]]


CALLS = Calls(_start, _losses, _history)
RANDOM = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class _Building(TorchFunctionMode):
    """Inside, torch calls `call` in place of each of its functions."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """What torch calls in place of `func`."""
        return self.call(func, args, dict(kwargs or {}))

    def call(self, func: Callable[..., Any], args: Sequence[Any], named: dict[str, Any]) -> Any:
        """Call `func`, or do something else, with these arguments; `named` may be changed."""
        raise NotImplementedError


class Unfilled(_Building):
    """Inside, a model is built without random values: for one whose weights are loaded next.

    Their memory is not touched: to fill the card's 1.4 GB takes longer than to read them.
    """

    def __init__(self, meta: bool = False) -> None:
        """Build it; with `meta`, for its shapes alone, with parameters that have no memory.

        In `torch.device("meta")` all else would be computed by torch's compiler, whose import takes
        seconds.
        """
        super().__init__()
        self.meta = meta
        self.left: list[nn.Parameter] = []  # those without values

    def call(self, func: Callable[..., Any], args: Sequence[Any], named: dict[str, Any]) -> Any:
        """See `_Building.call`."""
        if func is torch.empty and self.meta:
            named["device"] = "meta"
        if func not in RANDOM or not isinstance(named["tensor"], nn.Parameter):
            return func(*args, **named)
        self.left.append(named["tensor"])
        return named["tensor"]

    def fill(self, device: torch.device) -> None:
        """Set those without values to zeros on a device: the model runs before it is loaded."""
        for parameter in self.left:
            parameter.data = torch.zeros_like(parameter.data, device=device)


class WithGenerator(_Building):
    """Inside, this thread's models are initialized from one generator, whatever others use."""

    def __init__(self, generator: torch.Generator):
        super().__init__()
        self.generator = generator

    def call(self, func: Callable[..., Any], args: Sequence[Any], named: dict[str, Any]) -> Any:
        """See `_Building.call`."""
        if func in (*RANDOM, Tensor.normal_):  # `orthogonal_` calls the last
            named["generator"] = self.generator
        return func(*args, **named)


def parameters_by_part(model: I3LM) -> dict[str, int]:
    """Parameter count of embedding, layers of each kind, compressor, slots, head and norms."""
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        top = name.split(".")[0]
        part = "norms" if top.startswith("norm_") else top
        counts[part] = counts.get(part, 0) + parameter.numel()
    counts["norms"] = counts.pop("norms")  # last
    return counts


def by_decay(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of the parameters that weight decay applies to, and of the others.

    It applies to the matrices of projections and token tables.
    """
    matrices = nn.Linear, nn.Embedding
    decayed = {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, matrices)}
    names = [name for name, _ in model.named_parameters()]
    return [n for n in names if n in decayed], [n for n in names if n not in decayed]
