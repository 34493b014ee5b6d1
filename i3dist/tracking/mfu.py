"""Model FLOPs utilisation: the model's own operations as a share of what its GPUs can do.

    FLOPs per token = 6 x N + 12 x A
    MFU = FLOPs per token x tokens per second / peak FLOP/s of all GPUs

The peak is the data sheet's, dense bf16, everywhere in this project. What share of the best matrix
product measured in the same run that is stands beside it where it is known, under a name of its
own (`benchmarks/results.py`).

N is the number of weights that a token is multiplied with: each projection's stored weights, times
how often it is applied per token. Tables, norms and elementwise work (WKV among it) count nothing,
nor does padding. A is the sum over attention layers of width x keys that a token sees on average,
seen keys only, whatever a kernel computes. Forward is one third, backward two; a multiplication and
an addition are two operations (Kaplan et al., 2020, arXiv:2001.08361). MFU is that of Chowdhery et
al., 2022, arXiv:2204.02311.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from i3dist.config import ModelSettings
from i3dist.data.lanes import Batch
from i3dist.distributed.devices import uses_cuda
from i3dist.model.lm import I3LM
from i3dist.model.segments import causal_mask, history_mask, last_segment, segment_ids

# TFLOP/s of dense bf16 with fp32 accumulation, by words of the name that torch.cuda gives the GPU;
# the first match counts. Source: NVIDIA's data sheets of the products; for GeForce and RTX, the
# white papers of GA102, AD102 and GB202. If a sheet has only the rate with sparsity, half of that.
PEAK_TFLOPS = {
    "GB200": 2500.0,
    "B200": 2250.0,
    "H200 NVL": 835.5,
    "H200": 989.4,
    "GH200": 989.4,
    "H100 NVL": 835.5,
    "H100 PCIe": 756.5,
    "H100": 989.4,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.1,
    "L40": 181.1,
    "L4": 121.0,
    "RTX 6000 Ada": 364.2,
    "RTX A6000": 154.8,
    "RTX 5090": 209.5,
    "RTX 4090": 165.2,
    "RTX 3090": 71.0,
}


def peak_flops(name: str) -> float | None:
    """FLOP/s of a GPU by its name; None if it is not in `PEAK_TFLOPS`."""
    words = f" {name.replace('-', ' ')} "
    return next((1e12 * peak for part, peak in PEAK_TFLOPS.items() if f" {part} " in words), None)


class Gpu(NamedTuple):
    """A GPU that a run could use."""

    name: str
    peak: float | None  # FLOP/s by its data sheet, None if unknown
    memory: float  # bytes


H100 = Gpu("NVIDIA H100 80GB", 1e12 * PEAK_TFLOPS["H100"], 79.0 * 2**30)  # as its driver reports


def present_gpu() -> Gpu | None:
    """This rank's GPU; None on a CPU."""
    if not uses_cuda():
        return None
    found = torch.cuda.get_device_properties()
    return Gpu(found.name, peak_flops(found.name), float(found.total_memory))


def job_peak_flops(world_size: int) -> float | None:
    """FLOP/s of a job with one GPU like this rank's per rank; None if unknown or on a CPU."""
    peak = peak_flops(torch.cuda.get_device_name()) if uses_cuda() else None
    return None if peak is None else world_size * peak


class PerToken(NamedTuple):
    """Operands of the formula."""

    weights: float  # N
    attention: float  # A

    @property
    def flops(self) -> float:
        """Floating-point operations of forward and backward."""
        return 6 * self.weights + 12 * self.attention


class Seen(NamedTuple):
    """What a token sees on average, and what the compressor reads."""

    own: float  # tokens of its chunk, itself among them
    past: float  # chunks of history
    kept: float  # tokens of a chunk that latents are made of


def seen_in(batch: Batch, bos_id: int, chunks: int) -> Seen:
    """Means over a batch's tokens, where history has at most `chunks` chunks."""
    segments = segment_ids(batch.tokens, bos_id).flatten(0, 1)
    past = history_mask(segments, batch.depth.flatten(), chunks)
    kept = float(last_segment(segments).sum(-1).float().mean())
    return Seen(mean_seen(causal_mask(segments)), mean_seen(past), kept)


def seen_in_a_long_document(settings: ModelSettings) -> Seen:
    """Where every chunk has all of its history: the most that a token can see on average."""
    length = settings.chunk_length
    return Seen((length + 1) / 2, float(settings.history_chunks), float(length))


def per_token(model: I3LM, batch: Batch) -> PerToken:
    """Of a batch of windows; see `operations`."""
    seen = seen_in(batch, model.bos_id, model.settings.history_chunks)
    return operations(model, seen, batch.tokens.shape[1])


def operations(model: I3LM, seen: Seen, window: int) -> PerToken:
    """Of windows of `window` chunks, with a compressor or without compressor and history.

    Per chunk, M latents go through the projections that `Compressor.of_latents` names, and read the
    kept tokens: D channels each, whether by heads or by sub-latents. A window of K chunks projects
    the latents of C + K chunks; one costs as much as a token. Left out: router scores, picking
    queries, and work that does not grow with the lanes.
    """
    s = model.settings
    with_history = model.keys_per_chunk > 0
    latents = s.latents / s.chunk_length if with_history else 0.0
    again = latents * (s.history_chunks + window) / window
    uses = {"attention.key_value": 1 + again}
    if with_history:
        uses |= {f"compressor.{name}": latents for name in model.compressor.of_latents}
        uses |= {f"compressor.{name}": 0.0 for name in model.compressor.uncounted}
    weights = 0.0
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            use = next((n for part, n in uses.items() if part in name), 1.0)
            weights += use * module.weight.numel()
    keys = seen.own + model.keys_per_chunk * seen.past
    read = latents * seen.kept
    return PerToken(weights, s.d_model * (len(model.upper) * keys + read))


def mean_seen(mask: Tensor) -> float:
    """Keys a query sees on average; mask [..., queries, keys] bool."""
    return float(mask.sum() / mask[..., 0].numel())
