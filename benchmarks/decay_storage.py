"""Measures the error of two ways to store decays when the engine casts parameters to bf16.

    python benchmarks/decay_storage.py [--json FILE]

time_decay is (a) rounded to bf16, or (b) kept as an fp32 initial curve plus an offset rounded to
bf16. Each is compared with fp32 by its relative errors: of the decay per step, of the decay over
256 steps, and of WKV's output. The learned offsets are random, of several sizes.
"""

import json

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from i3dist.cli.paths import result_path
from i3dist.cli.program import ArgumentParser
from i3dist.files import write_result
from i3dist.model.layers import Channels
from i3dist.model.rwkv import TimeMix
from i3dist.ops.wkv import WkvInputs, wkv

WIDTH, LENGTH, LAYERS = 1180, 512, 12


def relative(value: Tensor, reference: Tensor) -> float:
    """Norm of the error over norm of the reference."""
    return float((value - reference).norm() / reference.norm())


def errors(stored: Tensor, exact: Tensor) -> dict[str, float]:
    """Errors that follow from `stored` time_decay in place of `exact`, both fp32 [C]."""
    w, w_exact = -stored.exp(), -exact.exp()
    k, v = torch.randn(2, 2, LENGTH, WIDTH).unbind(0)
    bonus, restart = torch.zeros(WIDTH), torch.zeros(2, LENGTH, dtype=torch.bool)
    y, _ = wkv(WkvInputs(w, bonus, k, v, restart))
    y_exact, _ = wkv(WkvInputs(w_exact, bonus, k, v, restart))
    return {
        "decay": relative(w, w_exact),
        "after 256 steps": relative((256 * w).exp(), (256 * w_exact).exp()),
        "output": relative(y, y_exact),
    }


def measure() -> list[dict[str, object]]:
    """One row per size of offset and way of storing."""
    torch.manual_seed(0)
    base = torch.cat([TimeMix(Channels(WIDTH), i, LAYERS).decay_base[None] for i in range(LAYERS)])[
        6
    ]
    rows: list[dict[str, object]] = []
    for size in (0.03, 0.1, 0.3, 1.0):
        offset = size * torch.randn(WIDTH)
        exact = base + offset
        ways = {
            "time_decay in bf16": exact.bfloat16().float(),
            "fp32 curve + bf16 offset": base + offset.bfloat16().float(),
        }
        for way, stored in ways.items():
            rows.append({"offset": size, "stored as": way, **errors(stored, exact)})
    return rows


def main() -> None:
    """Print the table."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=result_path, metavar="FILE", help="write the rows here too")
    arguments = parser.parse_args()
    rows = measure()
    table = Table(title="relative error against fp32", title_justify="left")
    for heading in rows[0]:
        table.add_column(heading)
    for row in rows:
        table.add_row(*(f"{x:.1e}" if isinstance(x, float) else str(x) for x in row.values()))
    Console(width=100).print(table)
    if arguments.json:
        write_result(arguments.json, f"{json.dumps(rows, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
