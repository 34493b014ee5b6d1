"""Amounts as texts of a fixed width, which stand below each other."""


def duration(seconds: float) -> str:
    """Six columns: "   42s", "12m05s", " 1h05m", " 3d04h"."""
    minutes, hours, days = (int(seconds) // unit for unit in (60, 3600, 86_400))
    if days:
        text = f"{days}d{hours % 24:02d}h"
    elif hours:
        text = f"{hours}h{minutes % 60:02d}m"
    elif minutes:
        text = f"{minutes}m{int(seconds) % 60:02d}s"
    else:
        text = f"{int(seconds)}s"
    return f"{text:>6}"


def short(number: float) -> str:
    """Five columns: "  850", " 3.3k", " 263k", "12.4M"."""
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if number >= size:
            decimals = 1 if number < 100 * size else 0
            return f"{number / size:4.{decimals}f}{unit}"
    return f"{number:5.0f}"
