"""Draw the picture of the model, architecture.svg: `python docs/figures/architecture.py`."""

from pathlib import Path

# The settings' defaults (tests/test_docs.py compares).
CHUNK, HISTORY, LATENTS, SUB_LATENTS = 512, 8, 32, 4
KEYS = LATENTS * SUB_LATENTS

GREY, BLUE, YELLOW = "#eef0f3", "#cfe3f7", "#ffe3b3"
RED, GREEN, WHITE = "#ffd0c2", "#d5efd0", "#fff"
STYLE = """\
text { font-family: Helvetica, Arial, sans-serif; font-size: 13px; text-anchor: middle;
       fill: #1c2733 }
.small { font-size: 11px; fill: #4a5663 }
.left { text-anchor: start }
rect { stroke: #5b6875; stroke-width: 1 }
.arrow { stroke: #3b4650; stroke-width: 1.5; fill: none; marker-end: url(#head) }
.dashed { stroke-dasharray: 5 4 }"""
HEAD = (
    '<marker id="head" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
    'orient="auto"><path d="M0 0 L8 4 L0 8 z" fill="#3b4650"/></marker>'
)


def text(x: int, y: int, words: str, kind: str = "") -> str:
    """A line of text, centered at x; `kind` is a class of `STYLE`."""
    return f'<text x="{x}" y="{y}" class="{kind}">{words}</text>'


def box(x: int, y: int, width: int, height: int, color: str, title: str, note: str = "") -> str:
    """A rectangle with a title and a smaller note below it."""
    middle, center = x + width // 2, y + height // 2
    return (
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="6" fill="{color}"/>'
        + text(middle, center - 3 if note else center + 5, title)
        + (text(middle, center + 13, note, "small") if note else "")
    )


def arrow(start: tuple[int, int], end: tuple[int, int], kind: str = "") -> str:
    """A straight arrow."""
    return f'<path d="M{start[0]} {start[1]} L{end[0]} {end[1]}" class="arrow {kind}"/>'


def earlier_chunk(x: int, name: str) -> list[str]:
    """A column: a chunk of tokens, up to its latents in the history."""
    middle = x + 50
    return [
        box(x, 362, 100, 36, GREY, name, f"{CHUNK} tokens"),
        arrow((middle, 362), (middle, 336)),
        box(x, 296, 100, 38, BLUE, "RWKV"),
        arrow((middle, 296), (middle, 262)),
        box(x, 222, 100, 38, YELLOW, "compressor"),
        arrow((middle, 222), (middle, 172)),
        box(x + 5, 130, 90, 40, WHITE, f"{LATENTS} latents"),
    ]


def history() -> list[str]:
    """The left part: earlier chunks and what is kept of them."""
    sizes = f"{HISTORY} chunks, {HISTORY * LATENTS} latents"
    keys = f"{HISTORY * KEYS:,} keys instead of {HISTORY * CHUNK:,} tokens"
    return [
        box(20, 92, 500, 90, RED, ""),
        text(270, 115, f"history: {sizes}, {keys}"),
        *earlier_chunk(35, f"chunk c-{HISTORY}"),
        *earlier_chunk(160, f"chunk c-{HISTORY - 1}"),
        *(text(335, y, "...") for y in (154, 245, 319, 384)),
        *earlier_chunk(410, "chunk c-1"),
        arrow((520, 137), (568, 137)),
    ]


def newest_chunk() -> list[str]:
    """The right part: from the newest chunk's tokens to the next token, and to its latents."""
    return [
        box(570, 362, 300, 36, GREY, "chunk c", f"{CHUNK} tokens"),
        arrow((720, 362), (720, 346)),
        box(570, 286, 300, 58, BLUE, "12 RWKV blocks", "state restarts with each chunk"),
        arrow((650, 286), (650, 184)),
        box(570, 92, 160, 90, GREEN, ""),
        text(650, 124, "2 attention blocks"),
        text(650, 144, "a softmax for own tokens,", "small"),
        text(650, 158, "and one for history", "small"),
        arrow((650, 92), (650, 64)),
        box(570, 24, 160, 38, GREY, "next token"),
        arrow((820, 286), (820, 262)),
        box(770, 222, 100, 38, YELLOW, "compressor"),
        arrow((820, 222), (820, 172), "dashed"),
        text(820, 150, f"{LATENTS} latents for", "small"),
        text(820, 164, f"chunks c+1 to c+{HISTORY}", "small"),
    ]


def caption() -> list[str]:
    """What the compressor does, in two lines."""
    first = (
        f"Compressor: a router scores the chunk's tokens. The {KEYS} with the highest scores get a "
        f"sub-latent of width D/{SUB_LATENTS} each,"
    )
    second = (
        "made by cross-attention over the chunk and refined by a feed-forward; "
        f"{SUB_LATENTS} sub-latents make a latent."
    )
    return [text(35, 428, first, "small left"), text(35, 446, second, "small left")]


def draw() -> str:
    """The picture as SVG."""
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 470">',
        f"<style>\n{STYLE}\n</style>",
        f"<defs>{HEAD}</defs>",
        '<rect width="900" height="470" rx="8" fill="#fff" style="stroke:none"/>',
        *history(),
        *newest_chunk(),
        *caption(),
        "</svg>\n",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    Path(__file__).with_suffix(".svg").write_text(draw(), encoding="utf-8")
