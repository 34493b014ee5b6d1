"""A model's weights: written when a run ends, loaded to evaluate and generate. No DeepSpeed."""

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from i3dist.checkpoint import store
from i3dist.checkpoint.exported import exported_joined, exported_settings, is_export
from i3dist.checkpoint.format import TOKENIZER, is_checkpoint, read_state
from i3dist.checkpoint.reader import OptimizerReader
from i3dist.checkpoint.verify import quick_fault
from i3dist.checkpoint.writer import write_tensors
from i3dist.config import Settings
from i3dist.data.tokenizer import Tokenizer
from i3dist.errors import UserError, reason
from i3dist.files import utf8_path, written_aside
from i3dist.model.compressor_kinds import COMPRESSORS
from i3dist.model.layer_kinds import Stack
from i3dist.model.lm import I3LM, Unfilled

WEIGHTS = "model.safetensors"


def export_weights(run: Path, model: I3LM, step: int) -> None:
    """Write RUN/model.safetensors: the weights after `step`, in the type of the forward pass.

    Raises:
        UserError: it cannot be written; an earlier file is untouched.
    """
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    try:
        with written_aside(run / WEIGHTS) as partial:
            write_tensors(partial, weights, step=str(step))
    except OSError as error:
        raise UserError(
            f"{run / WEIGHTS} cannot be written: {error.strerror}; fix that, then run the same "
            "command again to go on from the newest checkpoint"
        ) from None


@dataclass(frozen=True)
class SavedModel:
    """A trained model on disk: a finished run's, a checkpoint's, or an exported one."""

    path: Path
    settings: Settings
    tokenizer: Tokenizer
    joined: float
    """The share j of `I3LM.join_softmaxes` that the weights were trained with last."""

    @classmethod
    def find(cls, path: Path) -> Self:
        """Find the model that a path names.

        Args:
            path: a finished run's folder, a checkpoint anywhere, RUN/checkpoints, which means the
                newest one in it, or the folder of an exported model.

        Raises:
            UserError: path is none of these, or its files do not belong together.
        """
        path = newest_in(path)
        if is_checkpoint(path):
            if wrong := quick_fault(path):
                raise UserError(f"checkpoint {path}: {wrong}; name another")
            state = read_state(path)
            settings = Settings.build(state.settings).of_saved_run()
            joined = settings.compression.joined_after(state.step)
            tokenizer = Tokenizer.load(_tokenizer_of(path))
        else:
            if is_export(path):
                settings, joined = exported_settings(path), exported_joined(path)
            else:
                _check_finished(path)
                settings = Settings.load(path / store.SETTINGS).of_saved_run()
                step = _newest_step(path, settings.train.steps)
                joined = settings.compression.joined_after(step)
            tokenizer = Tokenizer.load(path / TOKENIZER)
        if settings.model.vocab_size != tokenizer.vocab_size:
            raise UserError(
                f"{tokenizer.path} has {tokenizer.vocab_size} entries but model.vocab_size of "
                f"{path} is {settings.model.vocab_size}; restore the run's own files"
            )
        Stack.of(settings.model, settings.place_of("model.layers"))
        COMPRESSORS.of(settings.model.compressor, settings.place_of("model.compressor"))
        return cls(path, settings, tokenizer, joined)

    def load_into(self, model: I3LM, assign: bool = False) -> torch.dtype:
        """Give a model these weights, rounded to the type of the forward pass; returns that type.

        With `assign` the model may then hold a file's own memory.

        Raises:
            UserError: some are missing, or have another shape.
        """
        if is_checkpoint(self.path):
            return _load_checkpoint(model, self.path, assign)
        return _load_export(model, self.path, assign)

    def as_model(self, device: torch.device, dtype: torch.dtype | None) -> I3LM:
        """The model in evaluation mode; see `load_run`.

        Raises:
            UserError: some weights are missing, or have another shape.
        """
        with Unfilled():
            model = I3LM(self.settings.model, self.tokenizer.bos_id)
        trained_in = self.load_into(model, assign=True)  # `copy` leaves the file's memory
        if self.joined:
            model.join_softmaxes(self.joined)
        dtype = dtype or (torch.float32 if device.type == "cpu" else trained_in)
        for parameter in model.parameters():
            parameter.data = parameter.data.to(device, dtype, copy=True)
        for buffer in model.buffers():  # stay fp32, as in training
            buffer.data = buffer.data.to(device, copy=True)
        return model.eval().requires_grad_(False)


def load_run(
    path: Path, device: torch.device, dtype: torch.dtype | None = None
) -> tuple[I3LM, Settings, Tokenizer]:
    """Load a trained model in evaluation mode, its settings and tokenizer.

    Args:
        path: as `SavedModel.find` takes it.
        device: the device to put the model on.
        dtype: of the parameters; by default fp32 on the CPU, elsewhere the type that the model was
            trained in.

    Raises:
        UserError: there is no such model, or it cannot be read.
    """
    saved = SavedModel.find(path)
    return saved.as_model(device, dtype), saved.settings, saved.tokenizer


def newest_in(path: Path) -> Path:
    """The newest checkpoint for RUN/checkpoints or `latest` in it; any other path unchanged."""
    folder = path.resolve().parent if path.name == store.LATEST and path.is_file() else path
    return store.candidates(folder)[0] if store.steps(folder) else path


def _tokenizer_of(path: Path) -> Path:
    """A checkpoint's own tokenizer.json or, if it has none, that of the run it lies in."""
    typed = Path(os.path.abspath(path))
    for folder in (path, typed.parent.parent, path.resolve().parent.parent, typed.parent):
        if (folder / TOKENIZER).exists():
            return folder / TOKENIZER
    raise UserError(
        f"checkpoint {path} is of an earlier version and has no {TOKENIZER}: copy that "
        f"of its run, or of its data, to {typed.parent}"
    )


def _check_finished(run: Path) -> None:
    """Raise `UserError` if there are no final weights in `run`: say what to name instead."""
    if not (run / store.SETTINGS).exists():
        none = "neither the folder of a run nor a checkpoint nor an export"
        raise UserError(
            f"{run} is {none if run.exists() else 'not there'}: name a run's folder with {WEIGHTS} "
            f"in it, its {store.CHECKPOINTS}, or an export"
        )
    if (run / WEIGHTS).exists():
        return
    raise UserError(f"{run / WEIGHTS} is missing: {_ways_on(run)}")


def _newest_step(run: Path, steps: int) -> int:
    """The step of the final weights, `steps` where they do not say.

    Raises:
        UserError: they are those of a shorter run, which was made longer.
    """
    step = ""
    path = utf8_path(run / WEIGHTS)
    with suppress(SafetensorError, OSError), path as name, safe_open(name, "pt") as file:
        step = (file.metadata() or {}).get("step", "")  # what cannot be read is refused later
    if not step.isdecimal():
        return steps
    if int(step) < steps:
        what = f"is of step {step}, and the run is to take {steps}"
        raise UserError(f"{run / WEIGHTS} {what}: {_ways_on(run)}")
    return int(step)


def _ways_on(run: Path) -> str:
    folder = run / store.CHECKPOINTS
    there = store.steps(folder)
    instead = store.place(folder, there[0]) if there else "another run"
    return f"a run writes it when it ends; continue the run with launch/train.py, or name {instead}"


def _load_export(model: I3LM, path: Path, assign: bool = False) -> torch.dtype:
    """Load what `export_weights` wrote to a run's folder, by copying or assigning the tensors;
    returns the type of the weights."""
    file = path / WEIGHTS
    if not file.exists():
        raise UserError(
            f"{file} is missing: an exported model is read from this one file; "
            "save_pretrained(..., max_shard_size='1TB') writes it"
        )
    try:
        with utf8_path(file) as name:
            weights = load_file(name)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} cannot be read: {reason(error)}; restore it") from None
    try:
        model.load_state_dict(weights, assign=assign)
    except RuntimeError as error:
        # The first line only says that there are errors.
        why = " ".join(str(error).partition("\n")[2].split())[:200]
        raise UserError(f"{file} does not fit the settings beside it: {why}; restore it") from None
    return weights["head.weight"].dtype


@torch.no_grad()
def _load_checkpoint(model: I3LM, path: Path, assign: bool = False) -> torch.dtype:
    """Load a checkpoint's weights, in the type of the forward pass, by copying or assigning the
    tensors; returns that type."""
    engine = read_state(path).engine
    dtype = torch.bfloat16 if engine.get("bf16", {}).get("enabled") else torch.float32
    reader = OptimizerReader(path)
    reader.check({name: p.numel() for name, p in model.named_parameters()})
    for name, parameter in model.named_parameters():
        weight = reader.one("weight", name).to(dtype).view_as(parameter)
        if assign:
            parameter.data = weight
        else:
            parameter.copy_(weight)
    return dtype
