"""Reads what `i3dist train --verbose` prints of a start."""

import re


def start_parts(output: str) -> dict[str, float]:
    """Seconds of each part of the start, which sum to those of "all"; "all" is the last.

    The second table, of compiled graphs, has rows that end in a number too.
    """
    table = re.search(r"time until the first step\s*\n((?:[┏┃┡│].*\n)+)└", output)
    assert table, output
    rows = re.findall(r"^│ ([^│]+?) +│ +([\d.]+) │$", table[1], re.MULTILINE)
    parts = {part: float(seconds) for part, seconds in rows}
    *each, (last, whole) = parts.items()
    rounding = 0.05 * len(parts) + 1e-6
    assert last == "all" and abs(whole - sum(seconds for _, seconds in each)) <= rounding, parts
    return parts
