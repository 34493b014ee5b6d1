"""Plots that benchmarks write."""

import argparse
from io import BytesIO
from pathlib import Path

from matplotlib.figure import Figure

from i3dist.cli.paths import result_path
from i3dist.files import write_result

KINDS = ("png", "svg", "pdf", "eps", "jpg", "jpeg", "webp", "tif", "tiff")
"""What matplotlib writes without other programs."""


def plot_path(text: str) -> Path:
    """A file to write a plot to, as the `type` of a command-line option.

    Raises:
        argparse.ArgumentTypeError: its name ends as none of `KINDS`, or it cannot be written.
    """
    path = result_path(text)
    if path.suffix and _kind(path) not in KINDS:
        names = ", ".join(f".{kind}" for kind in KINDS)
        raise argparse.ArgumentTypeError(f"{path} is no plot: end its name in one of {names}")
    return path


def save(figure: Figure, path: Path) -> None:
    """Write a plot of the kind that its name says, or a PNG, as to /dev/stdout."""
    data = BytesIO()
    figure.savefig(data, dpi=150, format=_kind(path) or KINDS[0])
    write_result(path, data.getvalue())


def _kind(path: Path) -> str:
    return path.suffix[1:].lower()
