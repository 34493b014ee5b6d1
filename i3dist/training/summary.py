"""What a run will be: settings, parameters, tokens, memory."""

from collections.abc import Iterable, Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from i3dist.config import Settings
from i3dist.data.corpus import Corpus
from i3dist.data.download import shown
from i3dist.errors import UserError
from i3dist.model.lm import I3LM, parameters_by_part
from i3dist.tracking.mfu import H100, present_gpu
from i3dist.training.estimate import (
    Memory,
    flops_per_token,
    memory_estimate,
    meta_model,
    share_of_peak,
    tokens_per_second,
)

GIB = 2**30
# Columns that stand to the right.
NUMBERS = ("count", "share", "one lane, GiB", "GiB", "TFLOP/s", "of it", "tokens/s", "hours")
LARGEST_ON_CPU = 100e6  # parameters; a step of the card takes minutes, and its run months


def count_parameters(settings: Settings) -> dict[str, int]:
    """Parameters by part, without allocating any."""
    return parameters_by_part(meta_model(settings))


def tokens_per_step(settings: Settings) -> int:
    """Tokens of one optimizer step of the whole job, when every lane is busy."""
    train = settings.train
    return train.lane_count * train.accumulation * train.window_chunks * settings.model.chunk_length


def print_overview(settings: Settings, corpus: Corpus, world_size: int) -> None:
    """Print what a run is, one line per topic."""
    model, train, data = settings.model, settings.train, corpus.train.manifest
    parameters = sum(count_parameters(settings).values())
    memory = memory_estimate(settings, parameters, world_size, (present_gpu() or H100).memory)
    per_step, gate = tokens_per_step(settings), settings.compression
    tokens = train.steps * per_step
    windows = f"{train.accumulation} windows x " if train.accumulation > 1 else ""
    ranks = f"{world_size} ranks" if world_size > 1 else "1 rank"
    topics = {
        "run": f"{settings.run.path}",
        "model": f"{parameters / 1e6:,.1f}M parameters: layers {model.layers} of width "
        f"{model.d_model:,}",
        "history": f"{model.history_chunks} chunks of {model.latents} latents each; off for "
        f"{gate.off_steps:,} steps, full after {gate.off_steps + gate.ramp_steps:,}"
        f"{joining(settings)}",
        "data": f"{shown(str(settings.data.path))}: {data.tokens / 1e6:,.1f}M tokens in "
        f"{len(data.shards):,} shards, vocabulary {data.vocab_size:,}",
        "batch": f"{per_step:,} tokens: {train.lanes} lanes x {windows}"
        f"{train.window_chunks} chunks x {model.chunk_length}",
        "training": f"{train.steps:,} steps, {tokens / 1e6:,.1f}M tokens "
        f"({tokens / data.tokens:.1f} epochs), on {ranks}",
        "memory": f"about {memory.total / GIB:.1f} GiB per rank",
    }
    for topic, text in topics.items():
        print_topic(topic, text)


def joining(settings: Settings) -> str:
    """When two softmaxes become one, as the end of a line; "" if they do not in this run."""
    compression = settings.compression
    if not (settings.joins and compression.joined_after(settings.train.steps)):
        return ""
    first, steps, share = compression.join_after, compression.join_steps, compression.joined_at(0)
    assert isinstance(first, int) and isinstance(steps, int), "join_* is not resolved"
    if share == 1:
        return "; its softmax and the chunk's are one from the start"
    if first < 0:
        end = first + steps
        return f"; its softmax and the chunk's begin {share:.0%} joined, fully after {end:,} steps"
    return f"; its softmax joins the chunk's after {first:,} steps, over {steps:,}"


def print_topic(topic: str, text: str) -> None:
    """Print a line of the overview."""
    print(f"{topic:<9} {text}", flush=True)


def print_tables(settings: Settings, world_size: int, data_tokens: int | None = None) -> None:
    """Print the settings, and what follows from them: parameters, memory, speed, tokens.

    Args:
        settings: the run's, decided.
        world_size: its ranks.
        data_tokens: tokens of the training data; None if there is none yet.
    """
    console = Console(width=100)
    model = meta_model(settings)
    parameters = parameters_by_part(model)
    total = sum(parameters.values())
    flat = ((name, str(value)) for name, value in settings.flat().items())
    console.print(_table("settings", ("setting", "value"), flat))
    shares = [(part, f"{count:,}", f"{count / total:.1%}") for part, count in parameters.items()]
    shares.append(("total", f"{total:,}", ""))
    console.print(_table("parameters", ("part", "count", "share"), shares))
    gpu = present_gpu() or H100
    memory = memory_estimate(settings, total, world_size, gpu.memory)
    console.print(_memory_table(memory))
    if memory.total > gpu.memory:
        print(f"That is more than the {gpu.memory / GIB:.1f} GiB of one {gpu.name}.")
    console.print(_speed_table(settings, model, world_size))
    print(
        f"Speed assumes {share_of_peak(settings.model.d_model):.0%} of the data sheet's dense bf16 "
        f"peak, and {flops_per_token(settings, model) / 1e9:.3f} GFLOPs a token\n"
        "(documents longer than the history). Validation, saving, and waiting for data or other "
        "ranks\nare left out."
    )
    train, per_step = settings.train, tokens_per_step(settings)
    tokens = train.steps * per_step
    epochs = f"no data at {shown(str(settings.data.path))}, so vocabulary and epochs are not known"
    if data_tokens is not None:
        epochs = f"{tokens / data_tokens:.2f} epochs of the data"
    print(f"tokens_total={tokens} ({epochs})")
    print(
        f"tokens_per_step={per_step} ({train.lanes} lanes x {train.accumulation} "
        f"windows x {train.window_chunks} chunks x {settings.model.chunk_length} tokens, "
        f"{world_size} ranks)"
    )
    print(f"parameters_total={total}")


def _memory_table(memory: Memory) -> Table:
    """What a rank's memory holds."""
    rows = [(what, "", f"{size / GIB:.2f}") for what, size in memory.fixed.items()]
    for what, size in memory.lane.items():
        name = f"{what}, {memory.lanes} lanes at once"
        rows.append((name, f"{size / GIB:.2f}", f"{memory.lanes * size / GIB:.2f}"))
    rows.append(("total", "", f"{memory.total / GIB:.2f}"))
    return _table("memory of a rank (estimate)", ("what", "one lane, GiB", "GiB"), rows)


def _speed_table(settings: Settings, model: I3LM, world_size: int) -> Table:
    """How fast the run is on the GPU present, if there is one, and on an H100."""
    present, rows = present_gpu(), []
    tokens = settings.train.steps * tokens_per_step(settings)
    same = present is not None and present.peak == H100.peak
    for gpu in filter(None, (present, None if same else H100)):
        rate = tokens_per_second(settings, model, gpu)
        if gpu.peak is None or rate is None:
            rows.append((f"{gpu.name}, of unknown peak", "", "", "", ""))
            continue
        rate *= world_size
        share = share_of_peak(settings.model.d_model)
        hours = tokens / rate / 3600
        figures = (f"{gpu.peak / 1e12:,.1f}", f"{share:.0%}", f"{rate:,.0f}", f"{hours:,.2f}")
        rows.append((f"{world_size} x {gpu.name}", *figures))
    heads = ("GPU", "TFLOP/s", "of it", "tokens/s", "hours")
    return _table(f"speed of {settings.train.steps:,} steps (estimate)", heads, rows)


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
