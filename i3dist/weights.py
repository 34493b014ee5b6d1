"""A finished run's weights: written when it ends, read to evaluate and generate; no DeepSpeed."""

import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from i3dist.config import Settings
from i3dist.errors import UserError
from i3dist.files import sync
from i3dist.model.lm import I3LM
from i3dist.tokenizer import Tokenizer


def export_weights(run: Path, model: I3LM, step: int) -> Path:
    """Write RUN/model.safetensors: the weights as the forward pass uses them after `step`."""
    path = run / "model.safetensors"
    staging = run / ".model.safetensors.partial"
    weights = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, staging, metadata={"step": str(step)})
    sync(staging)
    os.replace(staging, path)
    return path


def load_run(run: Path, device: torch.device) -> tuple[I3LM, Settings, Tokenizer]:
    """A finished run's model in evaluation mode, its settings and tokenizer; no DeepSpeed.

    On the CPU the model computes in fp32, elsewhere in the type of its weights.

    Raises:
        UserError: RUN is no finished run, or its files do not belong together.
    """
    path = run / "model.safetensors"
    if not path.is_file():
        raise UserError(
            f"{path} is missing: a run writes it when it ends; "
            "continue the run with launch/train.py, or name another --checkpoint"
        )
    settings = Settings.load(run / "settings.yaml")
    tokenizer = Tokenizer.load(run / "tokenizer.json")
    if settings.model.vocab_size != tokenizer.vocab_size:
        raise UserError(
            f"{tokenizer.path} has {tokenizer.vocab_size} entries but model.vocab_size in "
            f"{run / 'settings.yaml'} is {settings.model.vocab_size}; restore the run's own files"
        )
    try:
        weights = load_file(path, device=str(device))
        model = I3LM(settings.model, tokenizer.bos_id)
        model.load_state_dict(weights)
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path} does not fit {run / 'settings.yaml'}: {reason}") from None
    dtype = torch.float32 if device.type == "cpu" else weights["head.weight"].dtype
    for parameter in model.parameters():  # buffers stay fp32, as in training
        parameter.data = parameter.data.to(dtype)
    return model.to(device).eval().requires_grad_(False), settings, tokenizer
