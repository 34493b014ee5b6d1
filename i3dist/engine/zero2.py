"""ZeRO-2 with DeepSpeed's slow parts replaced, on two flat tensors.

`FlatModel` replaces parameters one by one, `_reduce` the reduction, `_step` norm, clipping and
overflow check, and on a GPU CUDA graphs replace launches of single kernels. docs/decisions.md and
docs/performance.md say what that gains.
"""

from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from i3dist.checkpoint.format import Fragment
from i3dist.config import OptimizerSettings, TrainSettings
from i3dist.distributed import collectives
from i3dist.engine import deepspeed_internals as internals
from i3dist.engine.flat_parameters import FlatModel
from i3dist.engine.interface import Engine, StepResult, check_applied, check_states, complete
from i3dist.engine.optimizer_state import PartitionedState
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState


class Zero2Engine(Engine):
    """DeepSpeed's ZeRO-2 optimizer, whose internals it reads and replaces."""

    def __init__(
        self,
        model: I3LM,
        config: dict[str, Any],
        optimizer: OptimizerSettings,
        train: TrainSettings,
    ):
        """Wrap the model; it is unchanged if this raises.

        Args:
            model: fp32, on any device; the engine moves and casts it.
            config: from `setup.read_engine_config`.
            optimizer: its kind and options.
            train: for clipping.

        Raises:
            UnknownDeepSpeedError: on every rank, if DeepSpeed's internals are not as expected.
        """
        if not internals.is_known_version():
            raise internals.UnknownDeepSpeedError("it knows 0.19.8 and later 0.19")
        self._flat = FlatModel(model)
        parameters = [[flat.parameter] for flat in self._flat.flats]
        super().__init__(model, self._flat, parameters, config, optimizer)
        self.clip = train.clip
        self._engine = internals.initialize(self._flat, self._optimizer, _complete(config))
        check_applied(self._engine, config)
        flats = [flat.parameter for flat in self._flat.flats]
        try:
            self._zero = internals.ZeroInternals(self._engine, flats, self._optimizer)
        except internals.UnknownDeepSpeedError:
            with suppress(Exception):  # what another version cannot undo stays
                self.close()
            raise
        self._zero.replace_reduction(self._reduce)
        self._reduced: set[int] = set()  # groups whose gradient this step has reduced
        self._state = PartitionedState(
            self._flat.flats, self._zero, self._optimizer, self._kind.states
        )
        model.to(self.device)
        self._flat.share()

    def prepare(self, tokens: Tensor, depth: Tensor, state: LaneState, gate: Tensor) -> None:
        """If the model is compiled for a GPU, record forward and backward as CUDA graphs.

        From then on all micro-batches must have this shape.
        """
        if self.model.compiled and self.device.type == "cuda":
            self._flat.capture(tokens, tokens, depth, state, gate)

    def backward(self, loss_sum: Tensor, targets: Tensor) -> None:
        """See `Engine.backward`. DeepSpeed divides by micro-batches; that is undone."""
        scale = self.micro_batches / targets.clamp(min=1)
        self._engine.backward(loss_sum * scale.to(loss_sum.dtype))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def _reduce(self, gradients: Tensor, dtype: torch.dtype) -> None:
        """Sum gradients over ranks and keep this rank's part; DeepSpeed calls it in backward.

        DeepSpeed's own `average_tensor` (0.19.8) sends every rank the whole sum, casts it back to
        the gradient's type and adds it to zeros.

        Args:
            gradients: [elements], the bucket: gradients of one or more flat tensors.
            dtype: what they are summed in.
        """
        self._compute.stop()
        groups = self._zero.bucket(dtype)
        flats = [self._flat.flats[group].parameter for group in groups]
        if sum(map(len, flats)) != len(gradients):
            raise self._unexpected()
        self._reduced.update(groups)
        if self._zero.keeps_fp32_gradients:
            collectives.all_sum(gradients)
            return
        parts = gradients.split([len(flat) for flat in flats])
        for group, gradient in zip(groups, parts, strict=True):
            size = self._zero.partition_sizes[group]
            self._zero.keep_gradient(group, collectives.sum_parts(gradient, size, dtype).float())

    def _unexpected(self) -> UserError:
        return UserError(
            f"DeepSpeed {internals.deepspeed.__version__} does not hand over gradients as "
            "expected: install the version in constraints.txt, or set train.engine=stock"
        )

    def _step(self, sums: Tensor, limit: float) -> StepResult:
        """Update, and wait for the figures while the device is still busy with the update."""
        if self._reduced != set(range(len(self._flat.flats))):
            raise self._unexpected()
        self._reduced.clear()
        figures = self._exchange(sums)
        norm = figures[0]
        skipped = ~(figures.isfinite().all() & (norm <= limit))
        arriving = torch.cat([skipped.view(1), figures]).to("cpu", non_blocking=True)
        arrived = torch.get_device_module(self.device).Event()
        arrived.record()
        self._optimizer.grad_scale = (norm / self.clip).clamp(min=1.0)  # type: ignore[attr-defined]
        self._optimizer.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._engine.step()
        arrived.synchronize()  # does not wait for the update
        was_skipped, norm_there, *sums_there = arriving.tolist()
        return StepResult(was_skipped == 0, norm_there, sums_there)

    def _exchange(self, sums: Tensor) -> Tensor:
        """[1 + N] fp32: norm of the whole job's gradient, of which this rank holds a part; sums."""
        parts = [
            torch.linalg.vector_norm(part)
            for group in self._zero.gradients.values()
            for part in group
        ]
        square = torch.stack(parts).square().sum().view(1)
        total = collectives.all_sum(torch.cat([square, sums]))
        return torch.cat([total[:1].sqrt(), total[1:]])

    def gradient_norm_of(self, prefix: str) -> float:
        """See `Engine.gradient_norm_of`."""
        norms = [torch.zeros((), device=self.device)]
        for place in self._state.places():
            if place.name.startswith(prefix):
                gradient = self._zero.gradients[place.group][0].flatten()  # [1] is padding
                norms.append(torch.linalg.vector_norm(place.of(gradient)))
        return float(collectives.all_sum(torch.stack(norms).square().sum()).sqrt())

    def snapshot(self) -> Iterator[Fragment]:
        """See `Engine.snapshot`."""
        return self._state.snapshot()

    def _copy_weights(self) -> None:
        """See `Engine._copy_weights`."""
        self._state.copy_weights()

    @torch.no_grad()
    def load(self, state: Mapping[str, dict[str, Tensor]], steps: int) -> None:
        """See `Engine.load`."""
        for name, parameter in self.model.named_parameters():
            entry = state[name]
            check_states(entry, self._kind.states)
            parameter.copy_(entry["weight"].view_as(parameter))
        self._state.load(state, steps)


def _complete(config: dict[str, Any]) -> dict[str, Any]:
    """`complete`, without what `Zero2Engine` does itself.

    DeepSpeed's norm and overflow check (0.19.8) read all gradients again, the norm in fp64, and
    wait for the result. Its throughput timer would wait for the device twice a step.
    """
    return complete(config, clip=0.0) | {
        "zero_optimization": config["zero_optimization"] | {"compute_grad_norm": False},
        "bf16": config.get("bf16", {}) | {"check_grad_overflow": False},
        "timers": {"throughput": {"enabled": False}},
    }
