"""DeepSpeed: the only file that imports it.

`Engine` runs one optimizer step in micro-batches and hands its optimizer state out, and takes it
in, as fragments by parameter name, which belong to no particular number of ranks. DeepSpeed itself
sees the few flat tensors of `PackedModel`: what it does per tensor costs more than the arithmetic.
"""

import logging
import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from i3dist.checkpoint.fragment import ADAM_STATES, KINDS, Fragment
from i3dist.config import Device, OptimizerSettings, TrainSettings
from i3dist.distributed import collectives, devices, rendezvous
from i3dist.distributed.job import Job
from i3dist.engine.config_file import numeric_part, read_engine_file
from i3dist.engine.flat_parameters import PackedModel, Slot
from i3dist.engine.toolchain import absent, variables, writable_caches
from i3dist.errors import UserError
from i3dist.model.lm import I3LM
from i3dist.model.state import LaneState
from i3dist.optim.adamw import FlatAdamW

# DeepSpeed still calls names that torch is about to retire.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")

# DeepSpeed reads its variables as it is imported, and fails where one is wrong; `dist` reads them
# when that can be said in a line. The autotuner would import MLflow.
_accelerator = "cuda" if devices.uses_cuda() else "cpu"
with absent("mlflow"), variables(DS_ACCELERATOR=_accelerator, DEEPSPEED_TIMEOUT=None):
    import deepspeed
    from deepspeed.accelerator import get_accelerator, set_accelerator
    from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
    from deepspeed.accelerator.cuda_accelerator import CUDA_Accelerator
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.zero.stage_1_and_2 import GradPartitionBufferGroup

# On CPU it would compile an operator for shared memory whenever it starts, which needs a compiler,
# a cache in the home folder and 66 MiB of /dev/shm a rank, and which only inference uses (0.19.8).
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


# Of a GPU's memory; the rest is for the CUDA context, NCCL and fragmentation.
MEMORY_SHARE = 0.92


def choose_device(wanted: Device) -> bool:
    """`devices.choose_device`, for DeepSpeed too, which made a choice of its own when imported."""
    for_want_of_gpu = devices.choose_device(wanted)
    kind = CUDA_Accelerator if devices.uses_cuda() else CPU_Accelerator
    if not isinstance(get_accelerator(), kind):
        set_accelerator(kind())
    return for_want_of_gpu


def read_engine_config(path: Path) -> dict[str, Any]:
    """Read and check the engine's file (configs/zero2.json).

    Raises:
        UserError: unreadable, not ZeRO-2, or a key or value that the engine does not honour.
    """
    config = read_engine_file(path)
    try:
        DeepSpeedConfig(_complete(config, micro_batches=1))
    except Exception as error:  # it lets through whatever its parser stumbles over
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"engine config {path}: DeepSpeed refuses it: {reason}") from None
    return config


class Stepped(NamedTuple):
    """What an optimizer step came to; the same on every rank."""

    taken: bool  # whether anything was updated
    norm: float  # of the whole job's gradient, before clipping
    sums: list[float]  # over ranks


class _Place(NamedTuple):
    """Where a parameter, or a part of it, lies in this rank's partition."""

    name: str
    slot: Slot
    group: int  # DeepSpeed's number of the partition
    first: int  # element of the flat tensor
    at: int  # the same element in the partition
    length: int  # elements

    def of(self, partition: Tensor) -> Tensor:
        """Its part of a partition, as a view."""
        return partition.narrow(0, self.at, self.length)


# (DeepSpeed's number of a partition, "weight" or a name of `ADAM_STATES`) -> [elements] fp32.
Held = dict[tuple[int, str], Tensor]


class Engine:
    """One rank's share of the model, its gradients and its optimizer."""

    def __init__(
        self,
        model: I3LM,
        config: dict[str, Any],
        optimizer: OptimizerSettings,
        train: TrainSettings,
        micro_batches: int = 1,
    ):
        """Wrap the model for ZeRO-2.

        Args:
            model: on any device, fp32; the engine moves and casts it.
            config: from `read_engine_config`.
            optimizer: AdamW's settings.
            train: clipping.
            micro_batches: of one optimizer step on this rank; see `accumulate`.
        """
        self.micro_batches = micro_batches
        self.numeric = numeric_part(config)
        self.clip = train.clip
        self.model = model
        self._packed = PackedModel(model)
        self._adamw = _adamw(self._packed, optimizer, model.compiled)
        with absent("deepspeed.runtime.zero.muon.muon_optimizer"):  # imports torch's compiler
            self._engine, *_ = deepspeed.initialize(
                model=self._packed, optimizer=self._adamw, config=_complete(config, micro_batches)
            )
        self._check(config)
        self._engine.optimizer.average_tensor = self._reduce
        self._reduced: set[int] = set()  # groups of this step
        self._host: Held = {}  # what `snapshot` copies to
        model.to(self.device)
        self._packed.share()

    def _check(self, config: dict[str, Any]) -> None:
        """DeepSpeed ignores what it does not understand: see that it took what it was given."""
        engine = self._engine
        bf16 = config.get("bf16", {}).get("enabled", False)
        taken = {
            "ZeRO stage": (engine.zero_optimization_stage(), 2),
            "bf16": (engine.bfloat16_enabled(), bf16),
            "accumulation": (engine.gradient_accumulation_steps(), self.micro_batches),
            "gradient accumulation dtype": (
                engine.optimizer.gradient_accumulation_dtype,
                torch.float32,
            ),
        }
        for what, (is_, wanted) in taken.items():
            if is_ != wanted:
                raise UserError(f"DeepSpeed runs with {what} {is_}, not {wanted}; see configs/")

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters in forward and backward."""
        return self.model.head.weight.dtype

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return torch.device(self._engine.device)

    def accumulate(self, micro_batches: int) -> None:
        """Take so many micro-batches for each optimizer step from now on."""
        self.micro_batches = micro_batches
        self._engine.set_train_batch_size(micro_batches * self._engine.dp_world_size)

    def fits(self, tokens: Tensor, depth: Tensor, state: LaneState, gate: Tensor) -> bool:
        """Whether a micro-batch of this shape leaves room on this GPU for the update.

        Runs it forward and backward; gradients are thrown away.
        """
        if self.device.type != "cuda":
            return True
        flats = [flat.parameter for flat in self._packed.flats]
        torch.cuda.reset_peak_memory_stats(self.device)
        try:
            losses, _ = self._packed(tokens, tokens, depth, state, gate)
            torch.autograd.grad(losses.sum(), flats)
            del losses
        except torch.OutOfMemoryError:
            torch._dynamo.reset()  # it keeps only so many shapes, and this one is not to be used
            return False
        finally:
            torch.cuda.empty_cache()
        # Still to come: fp32 gradients, whole and this rank's share, and AdamW's two moments.
        elements = sum(flat.numel() for flat in flats)
        update = elements * (4 + 12 / self._engine.dp_world_size)
        total = torch.cuda.get_device_properties(self.device).total_memory
        return torch.cuda.max_memory_allocated(self.device) + update < MEMORY_SHARE * total

    def prepare(self, tokens: Tensor, depth: Tensor, state: LaneState, gate: Tensor) -> None:
        """Get ready for micro-batches of this shape, and only this, if the model is compiled.

        On a GPU forward and backward are recorded as CUDA graphs: launching their kernels one by
        one takes the host longer than they take the GPU. No other thread may use CUDA meanwhile.
        """
        if self.model.compiled and self.device.type == "cuda":
            self._packed.capture(tokens, tokens, depth, state, gate)

    def __call__(
        self, tokens: Tensor, targets: Tensor, depth: Tensor, state: LaneState, gate: Tensor
    ) -> tuple[Tensor, LaneState]:
        """`I3LM.forward` through the engine."""
        losses, state = self._engine(tokens, targets, depth, state, gate)
        # The next replay of a graph overwrites what this one returned.
        return losses, state.map(lambda part: part.detach().clone())

    def backward(self, loss_sum: Tensor, targets: Tensor) -> None:
        """Add one micro-batch's share to the gradient of the step's mean loss.

        The step's loss is the sum of cross-entropy over all targets of the whole job's step,
        divided by their number. DeepSpeed divides by micro-batches; that is undone.

        Args:
            loss_sum: scalar, sum of token losses of the micro-batch.
            targets: scalar, number of targets in the whole job's step.
        """
        scale = self.micro_batches / targets.clamp(min=1)
        self._engine.backward(loss_sum * scale.to(loss_sum.dtype))
        if not self._engine.is_gradient_accumulation_boundary():
            self._engine.step()

    def step(self, lr: float, sums: Tensor | None = None, limit: float = math.inf) -> "Stepped":
        """Clip, and update all parameters with learning rate `lr`.

        Where the norm, or one of `sums`, is not finite, nothing is updated. What the job has to
        know is awaited while the device is still busy with the update, so that it does not fall
        idle.

        Args:
            lr: learning rate.
            sums: [N] fp32, figures of this rank to be summed over ranks along with the norm.
            limit: a norm above this updates nothing either.
        """
        zero = self._engine.optimizer
        if self._reduced != set(range(len(zero.bit16_groups))):
            raise UserError(
                f"DeepSpeed {deepspeed.__version__} does not hand over gradients as it is expected "
                "to; install the version in constraints.txt"
            )
        self._reduced.clear()
        for group in zero.param_groups:
            group["lr"] = lr
        figures = self._exchange(torch.empty(0, device=self.device) if sums is None else sums)
        norm = figures[0]
        skipped = ~(figures.isfinite().all() & (norm <= limit))
        arriving = _Arriving(torch.cat([skipped.view(1), figures]))
        # AdamW divides the gradient by the one, and does nothing where the other is 1.
        self._adamw.grad_scale = (norm / self.clip).clamp(min=1.0)  # type: ignore[attr-defined]
        self._adamw.found_inf = skipped.float()  # type: ignore[attr-defined]
        self._engine.step()
        was_skipped, norm_there, *sums_there = arriving.values()
        return Stepped(was_skipped == 0, norm_there, sums_there)

    def _exchange(self, sums: Tensor) -> Tensor:
        """[1 + N] fp32: norm of the whole job's gradient, of which this rank holds a part; sums."""
        groups = self._engine.optimizer.averaged_gradients.values()
        parts = [torch.linalg.vector_norm(part) for group in groups for part in group]
        square = torch.stack(parts).square().sum().view(1)
        total = collectives.all_sum(torch.cat([square, sums]))
        return torch.cat([total[:1].sqrt(), total[1:]])

    def gradient_norm_of(self, prefix: str) -> float:
        """Norm of the whole job's gradient of the parameters whose names begin with `prefix`.

        Before clipping. To be called by every rank, after the step's last `backward` and before
        `step`, which lets go of gradients. Waits for the device.
        """
        gradients = self._engine.optimizer.averaged_gradients
        norms = [torch.zeros((), device=self.device)]
        for place in self._places():
            if place.name.startswith(prefix):
                gradient = gradients[place.group][0].flatten()  # what follows it is padding
                norms.append(torch.linalg.vector_norm(place.of(gradient)))
        return float(collectives.all_sum(torch.stack(norms).square().sum()).sqrt())

    def close(self) -> None:
        """Let go of the model: DeepSpeed's hooks hold it, whoever else has forgotten it."""
        self._engine.destroy()

    def _reduce(self, gradients: Tensor, dtype: torch.dtype) -> None:
        """Sum gradients over ranks and keep this rank's part: DeepSpeed calls it after backward.

        In place of its own `average_tensor` (0.19.8), which reduces all of it to every rank, writes
        the sums back in the gradient's type and adds them to zeros.

        Args:
            gradients: [elements], those of the flat tensors in DeepSpeed's bucket.
            dtype: what they are summed in.
        """
        zero = self._engine.optimizer
        start = 0
        groups = [group for group, _, _ in zero.ipg_buckets[dtype].params]
        self._reduced.update(groups)
        if zero.dtype == torch.float32:  # then DeepSpeed itself keeps its part of the whole sum
            collectives.all_sum(gradients)
            return
        for group in groups:
            (flat,) = zero.bit16_groups[group]
            gradient = gradients.narrow(0, start, flat.numel())
            start += flat.numel()
            part = collectives.sum_parts(gradient, zero.partition_size[group], dtype).float()
            earlier = zero.averaged_gradients.get(group)
            if earlier is None:
                zero.averaged_gradients[group] = GradPartitionBufferGroup([part], part)
            else:
                earlier.flat_partition.add_(part)

    def snapshot(self) -> Iterator[Fragment]:
        """This rank's share of weights and optimizer state as it is now, parameter by parameter.

        Who calls waits until all of it is copied to the host. Any thread may then iterate over it,
        up to the next call, which copies to the same memory.
        """
        for key, tensor in self._held().items():
            if key not in self._host:  # pinned, since copies to other memory are ten times slower
                self._host[key] = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda)
            self._host[key].copy_(tensor, non_blocking=True)
        if self.device.type == "cuda":
            torch.cuda.current_stream(self.device).synchronize()
        places = list(self._places())
        return (
            Fragment(name, start, {key: part[mask] for key, part in parts.items()})
            for name, start, mask, parts in _shares(places, self._host)
        )

    def _held(self) -> Held:
        """What this rank holds of weights and optimizer state, in DeepSpeed's partitions.

        Its own accessors by parameter are no use here: they link AdamW's state after the first
        parameter group's first step, when the other groups have none yet (0.19.8).
        """
        zero = self._engine.optimizer
        held: Held = {}
        for group, partition in enumerate(zero.single_partition_of_fp32_groups):
            held[group, "weight"] = partition.detach()
            held |= {(group, key): zero.optimizer.state[partition][key] for key in ADAM_STATES}
        return held

    def _places(self) -> Iterator["_Place"]:
        """Where the parameters lie that this rank's partition holds, or holds a part of."""
        for flat in self._packed.flats:
            mapping = flat.parameter._hp_mapping  # type: ignore[attr-defined]
            if mapping is None:
                continue
            here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
            for name, slot in zip(flat.names, flat.slots, strict=True):
                first = max(slot.start, here.start)
                end = min(slot.start + slot.size, here.start + here.numel)
                if first < end:
                    at = there.start + first - here.start
                    yield _Place(name, slot, mapping.param_group_index, first, at, end - first)

    @torch.no_grad()
    def load(self, state: Mapping[str, dict[str, Tensor]], steps: int) -> None:
        """Take weights and optimizer state: the inverse of `snapshot`, for any number of ranks.

        Args:
            state: parameter name -> {"weight", "exp_avg", "exp_avg_sq"}, fp32, whole and 1-D.
            steps: optimizer steps taken so far.
        """
        self._create_adam_state(steps)
        for name, parameter in self.model.named_parameters():
            parameter.copy_(state[name]["weight"].view_as(parameter))
        for name, start, mask, parts in _shares(self._places(), self._held()):
            whole, length = state[name], int(mask.sum())
            for key, part in parts.items():
                part[mask] = whole[key].narrow(0, start, length).to(part.device)

    def _create_adam_state(self, steps: int) -> None:
        """Make AdamW's state, which torch only does in its first step, and set its step count."""
        zero = self._engine.optimizer
        for flat in zero.single_partition_of_fp32_groups:
            zero.optimizer.state[flat] = {
                "step": torch.tensor(float(steps), device=flat.device),
                **{key: torch.zeros_like(flat) for key in ADAM_STATES},
            }


def _shares(
    places: Iterable[_Place], held: Held
) -> Iterator[tuple[str, int, Tensor, dict[str, Tensor]]]:
    """Per parameter in a rank's partitions: its name, the first of its elements here, which
    elements of the tensors are its (the others are padding), and the tensors, views of `held`.
    """
    for place in places:
        views = {key: place.of(held[place.group, key]) for key in KINDS}
        mask = place.slot.mask(views["weight"].device)
        skipped = place.first - place.slot.start
        before, mask = mask.tensor_split([skipped, skipped + place.length])[:2]
        yield place.name, int(before.sum()), mask, views


def start(job: Job, name: str = "") -> None:
    """Join the process group of the job, which `name` tells from others: NCCL on GPUs, else gloo.

    Raises:
        UserError: ranks do not find each other (`rendezvous.meet`); DEEPSPEED_TIMEOUT is wrong.
    """
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    timeout = rendezvous.read_timeout()
    job.export()
    if devices.uses_cuda():
        torch.cuda.set_device(devices.device(job))
        writable_caches()
    with rendezvous.meet(job, name, timeout):
        deepspeed.init_distributed(dist_backend=devices.backend(), verbose=False, timeout=timeout)


def _complete(config: dict[str, Any], micro_batches: int) -> dict[str, Any]:
    """The engine's file, and what is decided here.

    The norm, clipping and the guard against overflow are `Engine.step`'s: DeepSpeed's (0.19.8) pass
    over all gradients again, in fp64, and stop for the result. Its throughput timer would wait for
    the device twice a step.
    """
    return config | {
        "zero_optimization": config["zero_optimization"] | {"compute_grad_norm": False},
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "gradient_clipping": 0.0,
        "bf16": config.get("bf16", {}) | {"check_grad_overflow": False},
        "timers": {"throughput": {"enabled": False}},
        "zero_allow_untested_optimizer": True,  # `FlatAdamW` is not on its list
    }


class _Arriving:
    """A few numbers on their way from the device to the host."""

    def __init__(self, numbers: Tensor):
        self.host = numbers.to("cpu", non_blocking=True)
        self.event = torch.cuda.Event() if numbers.is_cuda else None
        if self.event is not None:
            self.event.record()

    def values(self) -> list[float]:
        """Wait for them, and not for what was asked of the device since."""
        if self.event is not None:
            self.event.synchronize()
        return self.host.tolist()


def _adamw(packed: PackedModel, settings: OptimizerSettings, compiled: bool) -> torch.optim.AdamW:
    """AdamW with decay on matrices only."""
    groups = [
        {
            "params": [flat.parameter for flat in packed.flats if flat.decays == decays],
            "weight_decay": settings.weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]
    kind = FlatAdamW if compiled else torch.optim.AdamW
    return kind(
        groups,
        lr=settings.lr,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        fused=True,
    )
