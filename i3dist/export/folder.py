"""Writes the folder from which transformers loads a trained model."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import resources
from pathlib import Path
from secrets import token_hex

import torch
from torch import Tensor

from i3dist.checkpoint.exported import CONFIGURATION, is_export
from i3dist.checkpoint.format import TOKENIZER
from i3dist.checkpoint.weights import WEIGHTS, load_run
from i3dist.checkpoint.writer import write_tensors
from i3dist.errors import UserError
from i3dist.export.card import Figures, card
from i3dist.export.description import (
    configuration,
    generation_configuration,
    tokenizer_configuration,
    tokenizer_file,
)
from i3dist.files import PARTIAL, remove, sync, write_whole
from i3dist.model.lm import I3LM

CODE = ("configuration_i3.py", "modeling_i3.py")


def export(source: Path, out: Path, overwrite: bool = False) -> None:
    """Write a trained model as a folder for `AutoModelForCausalLM.from_pretrained`.

    Args:
        source: a finished run's folder or a checkpoint, as for `load_run`.
        out: the folder to write; it appears when it is complete.
        overwrite: replace an earlier export at `out`.

    Raises:
        UserError: `source` is no trained model or has parts of a user's own kind, or `out` is not
            empty.
    """
    _check_target(out, overwrite)
    model, settings, tokenizer = load_run(source, torch.device("cpu"))
    dtype = smallest_dtype(model)
    described = {
        CONFIGURATION: configuration(model, tokenizer, str(dtype).removeprefix("torch.")),
        "generation_config.json": generation_configuration(tokenizer),
        TOKENIZER: tokenizer_file(tokenizer),
        "tokenizer_config.json": tokenizer_configuration(),
    }
    figures = Figures.of(source, sum(p.numel() for p in model.parameters()))
    with folder_aside(out) as folder:
        for name, content in described.items():
            write_whole(folder / name, json.dumps(content, indent=2, ensure_ascii=False).encode())
        for name in CODE:
            code = resources.files("i3dist.export.files") / name
            write_whole(folder / name, code.read_bytes())
        write_whole(folder / "README.md", card(settings, figures, out.resolve().name).encode())
        facts = {} if figures.step is None else {"step": str(figures.step)}
        write_tensors(folder / WEIGHTS, weights(model, dtype), format="pt", **facts)
        shutil.copymode(folder / CONFIGURATION, folder / WEIGHTS)  # safetensors' is for the owner


def smallest_dtype(model: I3LM) -> torch.dtype:
    """bf16 where it holds every parameter exactly, as after training in bf16; else fp32."""
    exact = (bool((p == p.bfloat16()).all()) for p in model.parameters())
    return torch.bfloat16 if all(exact) else torch.float32


def weights(model: I3LM, dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of model.safetensors, in their stored shapes.

    Parameters are in `dtype`, buffers in fp32.
    """
    parameters = {name for name, _ in model.named_parameters()}
    return {
        name: (tensor.to(dtype) if name in parameters else tensor).contiguous()
        for name, tensor in model.state_dict().items()
    }


def _check_target(out: Path, overwrite: bool) -> None:
    """Refuse a path where something lies that must not be lost.

    Raises:
        UserError: it is no folder, or is not empty and may not be replaced.
    """
    there = next(place for place in (out, *out.resolve().parents) if place.exists())
    if not there.is_dir():
        raise UserError(f"{there} is no folder: name another place for the export")
    if Path.cwd().is_relative_to(out.resolve()):
        raise UserError(f"you are in {out}, which the export would replace: type it elsewhere")
    if not out.exists() or not any(out.iterdir()):
        return
    if not is_export(out):
        raise UserError(f"{out} holds something else than an export: name another folder")
    if not overwrite:
        raise UserError(f"{out} holds an export: name another folder, or replace it (--overwrite)")


@contextmanager
def folder_aside(out: Path) -> Iterator[Path]:
    """Yield an empty folder beside `out`, which then takes its place; if anything fails, it is
    removed and `out` stays what it was."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial, former = (out.with_name(f".{out.name}.{token_hex(8)}{PARTIAL}") for _ in range(2))
    try:
        partial.mkdir()
        yield partial
        sync(partial)
        if out.exists():
            out.rename(former)
        partial.rename(out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        if former.exists() and not out.exists():
            former.rename(out)
        raise
    sync(out.parent)
    if former.exists():
        remove(former)
