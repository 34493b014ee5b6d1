"""What the trainer calls: one optimizer step in micro-batches, and the state that a run saves."""

import gc
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from i3dist.checkpoint.format import Fragment
from i3dist.config import OptimizerSettings
from i3dist.distributed import collectives
from i3dist.engine.compute_timer import ComputeTimer
from i3dist.engine.config_file import numeric_part
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.optim.optimizers import OPTIMIZERS, build

# The share of a GPU's memory to use; the rest is for the CUDA context, NCCL and fragmentation.
MEMORY_SHARE = 0.92


class StepResult(NamedTuple):
    """The outcome of an optimizer step; the same on every rank."""

    updated: bool  # whether the weights were
    norm: float  # of the whole job's gradient, before clipping
    sums: list[float]  # of the figures that ranks gave to `step`


class Engine(ABC):
    """One rank's share of the model, its gradients and its optimizer.

    `Zero2Engine` replaces parts of DeepSpeed's ZeRO-2; `StockEngine` uses its public API alone.
    """

    def __init__(
        self,
        model: I3LM,
        module: nn.Module,
        parameters: Sequence[Sequence[nn.Parameter]],
        config: dict[str, Any],
        optimizer: OptimizerSettings,
    ):
        """Build the optimizer. The subclass then hands `module` to DeepSpeed.

        Args:
            model: fp32, on any device.
            module: what is trained: the model, or a module that calls it.
            parameters: of `module`, those with weight decay and those without.
            config: content of the engine's file.
            optimizer: its kind and options.
        """
        self.model = model
        self.micro_batches = 1  # of one optimizer step on this rank
        self.compute_seconds = 0.0  # this rank's own in the last step; 0 if not known
        self._compute = ComputeTimer()
        self.numeric_config = numeric_part(config)
        self._module = module
        self._kind = OPTIMIZERS.of(optimizer.kind)
        self._optimizer = build(parameters, optimizer, model.compiled)
        self._engine: Any = None  # DeepSpeed's

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters in forward and backward."""
        return self.model.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self._engine.device)

    def accumulate(self, micro_batches: int) -> None:
        """Take this many micro-batches for each optimizer step from now on."""
        self.micro_batches = micro_batches
        self._engine.set_train_batch_size(micro_batches * self._engine.dp_world_size)

    def fits(self, tokens: Tensor, depth: Tensor, state: LaneState, gate: Tensor) -> bool:
        """Whether this GPU has memory for such a micro-batch and the update after it.

        Runs forward and backward once and throws the gradients away. True on a CPU.

        Args:
            tokens: [B, K, T] int64.
            depth: [B, K] int64.
            state: of B lanes.
            gate: scalar.
        """
        if self.device.type != "cuda":
            return True
        parameters = list(self._module.parameters())
        gc.collect()  # what is garbage may hold memory of the GPU
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            losses, _ = self._module(tokens, tokens, depth, state, gate)
            torch.autograd.grad(losses.sum(), parameters, allow_unused=True)
            del losses
        except torch.OutOfMemoryError:
            gc.collect()
            torch._dynamo.reset()  # it keeps only a few shapes, and this one will not be used
            return False
        finally:
            torch.cuda.empty_cache()
        # The update adds fp32 gradients, whole and this rank's share, and the optimizer's state.
        elements = sum(parameter.numel() for parameter in parameters)
        share = 4 * (1 + len(self._kind.states)) / self._engine.dp_world_size
        update = elements * (4 + share)
        total = torch.cuda.get_device_properties(self.device).total_memory
        return torch.cuda.max_memory_allocated(self.device) + update < MEMORY_SHARE * total

    @abstractmethod
    def prepare(self, tokens: Tensor, depth: Tensor, state: LaneState, gate: Tensor) -> None:
        """Prepare for micro-batches of this shape, if the engine does anything for them.

        The arguments are those of `fits`. No other thread may use CUDA meanwhile.
        """

    def __call__(
        self, tokens: Tensor, targets: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        """`I3LM.forward` through the engine."""
        self._compute.start()
        losses, state = self._engine(tokens, targets, depth, state, gate)
        # The next replay of a CUDA graph overwrites what this one returned.
        return losses, state.map(lambda part: part.detach().clone())

    @abstractmethod
    def backward(self, loss_sum: Tensor, targets: Tensor) -> None:
        """Add one micro-batch's share to the gradient of the step's mean loss.

        The step's loss is the sum of cross-entropy over all targets of the whole job's step,
        divided by their number.

        Args:
            loss_sum: scalar, sum of the micro-batch's token losses.
            targets: scalar, number of targets in the whole job's step.
        """

    def step(self, lr: float, sums: Tensor | None = None, limit: float = math.inf) -> StepResult:
        """Clip the gradient and update all parameters.

        Nothing is updated if the gradient's norm or one of `sums` is not finite, or if the norm is
        above `limit`.

        Args:
            lr: learning rate.
            sums: [N] fp32, figures of this rank; their sums over ranks come back.
            limit: largest norm of a step that is taken.
        """
        for group in self._optimizer.param_groups:
            group["lr"] = lr
        sums = torch.empty(0, device=self.device) if sums is None else sums
        stepped = self._step(sums, limit)
        self.compute_seconds = self._compute.take()
        return stepped

    @abstractmethod
    def _step(self, sums: Tensor, limit: float) -> StepResult:
        """`step`, once the learning rate is set."""

    @abstractmethod
    def gradient_norm_of(self, prefix: str) -> float:
        """Norm, before clipping, of the whole job's gradient of parameters named `prefix`...

        Every rank calls this, after the step's last `backward` and before `step`, which frees the
        gradients. Waits for the device.
        """

    @abstractmethod
    def snapshot(self) -> Iterator[Fragment]:
        """Copy this rank's share of weights and optimizer state to the host.

        Every rank calls this. Any thread may iterate over the result; it and its tensors are valid
        until the next call.
        """

    @torch.no_grad()
    def set_weights(self, model: I3LM | None) -> None:
        """Copy the weights of rank 0's model to all ranks, as if it had been given to `__init__`.

        Every rank calls this, before its first step.

        Args:
            model: fp32, on any device, of the same settings; None on the other ranks.
        """
        if model is not None:
            for name, parameter in self.model.named_parameters():
                parameter.copy_(model.get_parameter(name))
        for parameter in self._module.parameters():
            collectives.broadcast(parameter)
        self._copy_weights()

    @abstractmethod
    def _copy_weights(self) -> None:
        """Set the optimizer's fp32 weights to those that the model computes with."""

    @abstractmethod
    def load(self, state: Mapping[str, dict[str, Tensor]], steps: int) -> None:
        """Restore weights and optimizer state that any number of ranks saved.

        Args:
            state: parameter name -> "weight" and the optimizer's states, whole: [elements] fp32.
            steps: number of optimizer steps that updated them.

        Raises:
            UserError: the state is another optimizer's.
        """

    def close(self) -> None:
        """Release the model: DeepSpeed's hooks keep it in memory until this is called."""
        self._engine.destroy()


def complete(config: dict[str, Any], clip: float) -> dict[str, Any]:
    """The engine's file with what the trainer decides: the batch, and clipping."""
    return config | {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,  # until `Engine.accumulate`
        "gradient_clipping": clip,
        "zero_allow_untested_optimizer": True,  # `FlatOptimizer` is not on DeepSpeed's list
    }


def check_applied(engine: Any, config: dict[str, Any]) -> None:
    """See that DeepSpeed's engine took its settings: it ignores what it does not know.

    Raises:
        UserError: it runs with another one.
    """
    taken = {
        "ZeRO stage": (engine.zero_optimization_stage(), 2),
        "bf16": (engine.bfloat16_enabled(), config.get("bf16", {}).get("enabled", False)),
        "accumulation": (engine.gradient_accumulation_steps(), 1),
    }
    for what, (found, wanted) in taken.items():
        if found != wanted:
            raise UserError(
                f"DeepSpeed runs with {what} {found}, not {wanted}: install the version "
                "in constraints.txt"
            )


def check_states(entry: Mapping[str, Tensor], states: tuple[str, ...]) -> None:
    """See that a parameter's tensors in a checkpoint are a weight and these optimizer states.

    Args:
        entry: the tensors by name; their [elements] are not looked at.
        states: names of the optimizer's states.

    Raises:
        UserError: they are another optimizer's.
    """
    if set(entry) != {"weight", *states}:
        found = ", ".join(sorted(set(entry) - {"weight"})) or "none"
        raise UserError(
            f"the checkpoint's optimizer state is {found}, but this optimizer.kind keeps "
            f"{', '.join(states)}: set optimizer.kind to what the run began with, or start over "
            "with --fresh"
        )
