"""What the demo shows, as HTML: every text escaped, every picture with a text alternative.

Pictures travel inside the page as data, so that no file of the server is ever named in it.
"""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from PIL import Image, ImageDraw

from nanollava.anyres import Layout, cut_views, describe
from nanollava.generate import Seen

LARGEST = 360  # pixels of a picture's longer side
GRID = (209, 73, 91)


@dataclass
class Exchange:
    """A question and its answers: one, or two at two settings."""

    question: str
    settings: list[str]
    answers: list[str] = field(default_factory=list)
    note: str = ""  # why it ended early, if it did
    running: bool = True


def picture(image: Image.Image, alt: str, kind: str = "") -> str:
    """An image as an <img> of at most LARGEST pixels; small ones keep their pixels visible."""
    image = image.copy()
    image.thumbnail((LARGEST, LARGEST))
    image.save(file := io.BytesIO(), "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img class="{kind}" src="data:image/png;base64,{data}" alt="{escape(alt)}">'


def with_grid(image: Image.Image, lay: Layout) -> Image.Image:
    """The image with its tiles' edges drawn over it."""
    (a, b), (left, top), (w, h) = lay.grid, lay.offset, lay.fitted
    zoom = LARGEST / max(image.size)
    size = (max(1, round(image.width * zoom)), max(1, round(image.height * zoom)))
    image = image.resize(size, Image.NEAREST if zoom > 1 else Image.BILINEAR)
    draw, sx, sy = ImageDraw.Draw(image), image.width / max(w, 1), image.height / max(h, 1)
    for i in range(a + 1 if a else 0):
        x = min(max((i * lay.tile - left) * sx, 0), image.width - 1)
        draw.line((x, 0, x, image.height), GRID, 2)
    for i in range(b + 1 if b else 0):
        y = min(max((i * lay.tile - top) * sy, 0), image.height - 1)
        draw.line((0, y, image.width, y), GRID, 2)
    return image


def sees(images: Sequence[Image.Image], layouts: Sequence[Layout], T: int) -> str:
    """The grid over each image, its views as the encoder gets them, and the tokens they become."""
    if not images:
        return "<p>Drop an image into the question, or press <b>New page</b>.</p>"
    parts = []
    for i, (image, lay) in enumerate(zip(images, layouts, strict=True), 1):
        (a, b), views = lay.grid, cut_views(image, lay).permute(0, 2, 3, 1).numpy()
        base, *tiles = (Image.fromarray(view) for view in views)
        name = f"image {i}" if len(images) > 1 else "the image"
        over = picture(with_grid(image, lay), f"{name} under a grid of {a} by {b} tiles", "over")
        shown = picture(base, f"{name} squashed to {lay.tile} pixels: the base view", "view")
        cells = "".join(
            picture(tile, f"tile in row {n // a + 1}, column {n % a + 1}", "view")
            for n, tile in enumerate(tiles)
        )
        glyph = float(image.info.get("glyph_px", 0))
        formula = f"({a} x {b} + 1) x {T} = {lay.views * T}" if a else T
        drawn = f"grid {a} x {b}" if a else "no grid"
        told = "<br>".join(map(escape, describe(lay, T, glyph).split("\n")))
        parts.append(
            f'<figure><figcaption><b data-tokens="{lay.tokens}">{formula} '
            f"features &rarr; {lay.tokens} visual tokens</b></figcaption>"
            f'<div class="views"><div>{over}<small>{drawn}</small></div>'
            f"<div>{shown}<small>base view</small></div>"
            f'<div class="tiles" style="grid-template-columns: repeat({max(a, 1)}, 1fr)">{cells}'
            f"</div></div><p>{told}</p></figure>"
        )
    return f'<div class="sees">{"".join(parts)}</div>'


def talk(exchanges: Sequence[Exchange], images: int = 0, error: str = "") -> str:
    """The conversation so far; two answers to one question stand side by side."""
    rows = []
    for exchange in exchanges:
        answers = zip(exchange.settings, [*exchange.answers, *[""] * 2])
        cards = "".join(
            f'<div class="answer"><small>{escape(setting)}</small><p>{escape(text) or "&hellip;"}'
            f"</p></div>"
            for setting, text in answers
        )
        note = f'<p class="note">{escape(exchange.note)}</p>' if exchange.note else ""
        rows.append(
            f'<p class="question">{escape(exchange.question)}</p>'
            f'<div class="answers">{cards}</div>{note}'
        )
    about = f"about {images} image{'s' * (images > 1)}" if images else "without an image"
    empty = f"<p>Ask something {about}.</p>"
    failed = f'<p class="error" role="alert">{escape(error)}</p>' if error else ""
    said = f'<div class="said">{"".join(rows) or empty}{failed}</div>'
    return f'<div class="talk" role="log" tabindex="0" aria-label="conversation">{said}</div>'


def speed(seen: Seen | None, cache: int, process: int) -> str:
    """How fast the last answer was, how much of its prompt was reused, and memory in MB."""
    if seen is None:
        return "<p>Nothing has been answered yet.</p>"
    rest = max(seen.seconds - seen.first, 1e-9)
    rows = {
        "first token": f"{seen.first:.3f} s",
        "then": f"{max(len(seen.written) - 1, 0) / rest:.0f} tokens/s",
        "prompt": f"{len(seen.document.ids)} positions, {seen.reused} of them reused",
        "keys and values": f"{cache / 1e6:.1f} MB",
        "the process, at most": f"{process / 1e6:.0f} MB",
    }
    cells = "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in rows.items())
    return f'<table class="speed">{cells}</table>'
