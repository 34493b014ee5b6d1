"""What a run will be: settings, parameters, tokens, memory."""

from collections.abc import Iterable, Sequence

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.data.download import shown
from i3dist.errors import UserError
from i3dist.model.layer_kinds import LAYER_KINDS
from i3dist.model.lm import I3LM, parameters_by_part

GIB = 2**30
NUMBERS = ("count", "share", "GiB")  # columns that stand to the right
LARGEST_ON_CPU = 100e6  # parameters; a step of the card takes minutes, and its run months


def count_parameters(settings: Settings) -> dict[str, int]:
    """Parameters by part, without allocating any."""
    with torch.device("meta"):
        return parameters_by_part(I3LM(settings.model, bos_id=0))


def tokens_per_step(settings: Settings) -> int:
    """Tokens of one optimizer step of the whole job, when every lane is busy."""
    train = settings.train
    return train.lane_count * train.accumulation * train.window_chunks * settings.model.chunk_length


def memory_estimate(settings: Settings, parameters: int, world_size: int) -> dict[str, float]:
    """Bytes on one rank, by what they hold. A guide, not a bound.

    Every rank keeps bf16 weights and gradients (4 bytes a parameter) and, while they are reduced,
    the fp32 gradients (4 bytes); ZeRO shares out fp32 weights and two AdamW moments (12 bytes).
    Activations are those that compiled blocks keep for backward: about `kept_values` x D per token
    in a layer (with 4x feed-forward) and 7 D elsewhere, in bf16, and the logits with their
    gradients. With the card's 4 lanes, and layers of `attention`, one H200 held 19.5 GiB.
    """
    model, train = settings.model, settings.train
    lanes = train.lane_count // world_size
    rows = lanes if train.micro_batch == "auto" else train.micro_batch
    tokens = rows * train.window_chunks * model.chunk_length
    values = model.d_model * (
        sum(LAYER_KINDS.of(kind).kept_values for kind in model.layer_kinds) + 7
    )
    return {
        "weights and gradients, bf16": 4.0 * parameters,
        "gradients, fp32": 4.0 * parameters,
        "weights and AdamW, fp32, 1/ranks": 12.0 * parameters / world_size,
        "activations of a micro-batch": 2.0 * tokens * values,
        "logits of a micro-batch": 4.0 * tokens * model.vocab,
    }


def print_overview(settings: Settings, corpus: Corpus, world_size: int) -> None:
    """Print what a run is, one line per topic."""
    model, train, data = settings.model, settings.train, corpus.train.manifest
    parameters = sum(count_parameters(settings).values())
    memory = sum(memory_estimate(settings, parameters, world_size).values())
    per_step, gate = tokens_per_step(settings), settings.compression
    tokens = train.steps * per_step
    windows = f"{train.accumulation} windows x " if train.accumulation > 1 else ""
    ranks = f"{world_size} ranks" if world_size > 1 else "1 rank"
    topics = {
        "run": f"{settings.run.path}",
        "model": f"{parameters / 1e6:,.1f}M parameters: layers {model.layers} of width "
        f"{model.d_model:,}",
        "history": f"{model.history_chunks} chunks of {model.latents} latents each; off for "
        f"{gate.off_steps:,} steps, full after {gate.off_steps + gate.ramp_steps:,}",
        "data": f"{shown(str(settings.data.path))}: {data.tokens / 1e6:,.1f}M tokens in "
        f"{len(data.shards):,} shards, vocabulary {data.vocab_size:,}",
        "batch": f"{per_step:,} tokens: {train.lanes} lanes x {windows}"
        f"{train.window_chunks} chunks x {model.chunk_length}",
        "training": f"{train.steps:,} steps, {tokens / 1e6:,.1f}M tokens "
        f"({tokens / data.tokens:.1f} epochs), on {ranks}",
        "memory": f"about {memory / GIB:.1f} GiB per rank",
    }
    for topic, text in topics.items():
        print_topic(topic, text)


def print_topic(topic: str, text: str) -> None:
    """Print a line of the overview."""
    print(f"{topic:<9} {text}", flush=True)


def print_tables(settings: Settings, world_size: int) -> None:
    """Print settings, the parameter table, tokens per step and the memory estimate."""
    console = Console(width=100)
    parameters = count_parameters(settings)
    total = sum(parameters.values())
    memory = memory_estimate(settings, total, world_size)
    flat = ((name, str(value)) for name, value in settings.flat().items())
    console.print(_table("settings", ("setting", "value"), flat))
    shares = [(part, f"{count:,}", f"{count / total:.1%}") for part, count in parameters.items()]
    shares.append(("total", f"{total:,}", ""))
    console.print(_table("parameters", ("part", "count", "share"), shares))
    sizes = [*memory.items(), ("total", sum(memory.values()))]
    rows = [(what, f"{size / GIB:.2f}") for what, size in sizes]
    console.print(_table("memory of a rank (estimate)", ("what", "GiB"), rows))
    train = settings.train
    print(
        f"tokens_per_step={tokens_per_step(settings)} ({train.lanes} lanes x {train.accumulation} "
        f"windows x {train.window_chunks} chunks x {settings.model.chunk_length} tokens, "
        f"{world_size} ranks)"
    )
    print(f"parameters_total={total}")


def refuse_large(settings: Settings) -> None:
    """Refuse to train a large model on a CPU that nobody asked for.

    Raises:
        UserError: the model is too large.
    """
    parameters = sum(count_parameters(settings).values())
    if parameters > LARGEST_ON_CPU:
        raise UserError(
            f"there is no GPU here, and a model of {parameters / 1e6:.0f}M parameters is slow to "
            f"train on a CPU: minutes for a step of {tokens_per_step(settings):,} tokens; start it "
            "on a GPU, try out a small one (--config tiny), or set train.device=cpu "
            "to train this one all the same"
        )


def _table(title: str, heads: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """A table of texts."""
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="right" if head in NUMBERS else "left")
    for row in rows:
        table.add_row(*map(Text, row))  # a path may hold brackets
    return table
