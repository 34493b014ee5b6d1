"""Model FLOPs utilisation: the model's own operations as a share of what its GPUs can do.

    FLOPs per token = 6 x N + 12 x A
    MFU = FLOPs per token x tokens per second / peak FLOP/s of all GPUs

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


def per_token(model: I3LM, batch: Batch) -> PerToken:
    """A window of the i3, with a compressor or without compressor and history.

    Per chunk, M latents go through the projections that `Compressor.of_latents` names, and read the
    kept tokens: D channels each, whether by heads or by sub-latents. A window of K chunks projects
    the latents of C + K chunks; one costs as much as a token. Left out: router scores, picking
    queries, and work that does not grow with the lanes.
    """
    s, (_, window, length) = model.settings, batch.tokens.shape
    with_history = model.keys_per_chunk > 0
    latents = s.latents / length if with_history else 0.0
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
    segments = segment_ids(batch.tokens, model.bos_id).flatten(0, 1)
    keys = mean_seen(causal_mask(segments))
    read = 0.0
    if with_history:
        past = history_mask(segments, batch.depth.flatten(), s.history_chunks)
        keys += model.keys_per_chunk * mean_seen(past)
        read = latents * float(last_segment(segments).sum(-1).float().mean())
    return PerToken(weights, s.d_model * (len(model.upper) * keys + read))


def mean_seen(mask: Tensor) -> float:
    """Keys a query sees on average; mask [..., queries, keys] bool."""
    return float(mask.sum() / mask[..., 0].numel())
