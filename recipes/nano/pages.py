"""Pages of the nano world: what stands where, and its pixels.

    page = layout(random.Random(0), "doc", "train")
    page.lines() -> ["tax 305", "fee 21", ...]        # what is true about it
    render(page) -> uint8[192, 192, 3]

Native sizes (width x height): documents 192x192 (legible at 3x3 tiles of 48 pixels, hurt at 2x2,
unreadable in one view), sheets 288x288 (legible from 4x4 on), charts and scenes 96x96, info pages
96x192. Text stands at any real-valued position, in nine faces and five sizes, lower, Capitalised or
UPPER case, with or without a sign behind a key, which nothing but the pixels shows. `zh` pages are
documents whose keys are Chinese.
A layout knows the place of every glyph, so that stage 0 can label pixels and write text twins
without drawing. The split `hard` has test facts of its own under strokes and noise.

    apt install fonts-droid-fallback
    python recipes/nano/pages.py /usr/share/fonts/truetype/droid/DroidSansFallbackFull.ttf

draws atlas.png again.
"""

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

# fmt: off
KEYS = ["tax", "fee", "rent", "cost", "date", "room", "gate", "seat", "bus", "code", "desk", "unit",
        "item", "size", "team", "tip", "ward", "shop", "mile", "zone", "bill", "debt", "loan",
        "fund"]
HAN = list("税费租价日房门座车码桌位物寸队赏区店里带单债贷金")  # the same words, one sign each
TITLES = ["invoice", "receipt", "report", "notes", "order", "total", "account", "summary"]
COLOURS = {"red": (214, 40, 40), "green": (40, 150, 60), "blue": (40, 80, 220),
           "yellow": (240, 205, 30), "purple": (130, 50, 160), "orange": (245, 135, 20),
           "cyan": (40, 195, 215), "black": (30, 30, 30)}
# fmt: on
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
OBJECTS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
PLACES = [f"{y} {x}" for y in ("top", "middle", "bottom") for x in ("left", "centre", "right")]
WAYS = ("left", "right", "up", "down")
# A fact "key value" belongs to one split for good: no pair is ever seen in two of them.
SHARES = {"train": range(12), "val": range(12, 14), "test": range(14, 16),
          "tuning": range(16, 18), "hard": range(18, 20)}  # fmt: skip

# Faces of matplotlib (DejaVu, STIX) and of Pillow (Aileron).
FACES = ("DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif-Bold", "DejaVuSans-Bold",
         "DejaVuSansMono", "DejaVuSerif", "STIXGeneral", "STIXGeneralBol", "Aileron")  # fmt: skip
PIXELS = (9, 10, 11, 12, 13)
CHARS = "".join(map(chr, range(32, 127))) + "".join(HAN)
CELL, BASELINE = 18, 13  # a glyph's square in the atlas, and where its baseline is in it
DIGIT = 0.73  # a digit is this high in every face, in sizes
ATLAS = Path(__file__).with_name("atlas.png")

Box = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels


def load_face(face: str, size: float) -> ImageFont.FreeTypeFont:
    """A face so large that its digits are DIGIT x `size` pixels high."""
    import matplotlib

    file = Path(matplotlib.get_data_path(), "fonts/ttf", f"{face}.ttf")

    def load(pixels: float) -> ImageFont.FreeTypeFont:
        default = face == "Aileron"
        return ImageFont.load_default(pixels) if default else ImageFont.truetype(file, pixels)

    return load(size * DIGIT * 1000 / -load(1000).getbbox("1", anchor="ls")[1])


def draw_atlas(han: str, path: Path = ATLAS) -> None:
    """Draw every glyph, one row per face and size; `han` is a font file for the second script.

    But for the first three, faces are drawn four times too large and reduced: unhinted, as
    browsers print.
    """
    image = Image.new("L", (CELL * len(CHARS), CELL * len(FACES) * len(PIXELS)))
    advances = []
    for row, (face, size) in enumerate((face, size) for face in FACES for size in PIXELS):
        times = 1 if face in FACES[:3] else 4
        latin, other = load_face(face, size * times), ImageFont.truetype(han, size * times)
        fonts = [latin if char.isascii() else other for char in CHARS]
        for column, (char, font) in enumerate(zip(CHARS, fonts, strict=True)):
            cell = Image.new("L", (CELL * times, CELL * times))
            spot = (times, BASELINE * times)
            ImageDraw.Draw(cell).text(spot, char, fill=255, font=font, anchor="ls")
            image.paste(cell.reduce(times), (column * CELL, row * CELL))
        pairs = zip(CHARS, fonts, strict=True)
        advances.append([round(font.getlength(char) / times, 2) for char, font in pairs])
    note = PngImagePlugin.PngInfo()
    note.add_text("advances", json.dumps(advances))
    image.save(path, pnginfo=note, optimize=True)


@cache
def atlas() -> tuple[np.ndarray, list[dict[str, float]]]:
    """Ink of each glyph uint8[faces * sizes, glyphs, CELL, CELL], and its advance in pixels."""
    image = Image.open(ATLAS)
    ink = np.asarray(image).reshape(-1, CELL, len(CHARS), CELL).transpose(0, 2, 1, 3)
    advances = json.loads(image.text["advances"])
    return np.ascontiguousarray(ink), [dict(zip(CHARS, a, strict=True)) for a in advances]


@dataclass
class Item:
    """One printed word (with its glyphs) or one object, at its place on a page."""

    text: str  # lower case, as a transcription has it
    box: Box
    row: int  # its line in reading order
    drawn: str = ""  # as printed, perhaps with a sign behind it; "" for an object
    font: int = 0  # row of the atlas
    edges: list[float] = field(default_factory=list)  # n + 1 x positions around n glyphs


@dataclass
class Page:
    """A layout: everything that is true about a picture, before any pixel."""

    kind: str
    size: tuple[int, int]  # width, height
    items: list[Item] = field(default_factory=list)
    facts: list[tuple[str, str]] = field(default_factory=list)  # key, value; place, object
    paper: tuple[int, ...] = (255, 255, 255)
    ink: tuple[int, ...] = (0, 0, 0)
    bars: list[tuple[int, int, int, int]] = field(default_factory=list)
    sign: str = ""  # printed behind every key
    hard: bool = False  # under strokes and noise

    def lines(self) -> list[str]:
        """What the page says, line by line in reading order; a scene says where things are."""
        if self.kind == "scene":
            return [f"{place} {thing}" for place, thing in self.facts]
        return rows_of(self.items)

    @property
    def glyph_px(self) -> int:
        """The size of the page's smallest type in pixels; 0 where nothing is printed."""
        return min((PIXELS[i.font % len(PIXELS)] for i in self.items if i.drawn), default=0)

    def write(
        self, rng: random.Random, fact: tuple[str, str], x: float, x_value: float, y: float,
        font: int, row: int,
    ) -> None:  # fmt: skip
        """Print a key from x on the baseline y, and its value from x_value or behind it."""
        self.items.append(word(cased(rng, fact[0]), x, y, font, row, self.sign))
        x_value = max(x_value, self.items[-1].box[2] + 4)
        self.items.append(word(fact[1], x_value, y, font, row))
        self.facts.append(fact)


def word(text: str, x: float, y: float, font: int, row: int, sign: str = "") -> Item:
    """An item for a word whose first glyph starts at x (any real number) on the baseline y."""
    advances, edges = atlas()[1][font], [x]
    for char in text + sign:
        edges.append(edges[-1] + advances[char])
    box = (x, y - DIGIT * PIXELS[font % len(PIXELS)], edges[-1], y)
    return Item(text.lower(), box, row, text + sign, font, edges)


def rows_of(items: Sequence[Item]) -> list[str]:
    """Texts of items joined by row, left to right."""
    rows: dict[int, list[Item]] = {}
    for item in items:
        rows.setdefault(item.row, []).append(item)
    return [" ".join(i.text for i in sorted(rows[r], key=lambda i: i.box[0])) for r in sorted(rows)]


# ------------------------------------------------------------------------------ layouts


def in_split(fact: str, split: str) -> bool:
    """Whether a fact may be shown in a split."""
    return crc32(fact.encode()) % 20 in SHARES[split]


def draw_value(rng: random.Random, subject: str, split: str, digits: Sequence[int]) -> str:
    """A number for a subject, out of those that belong to the split."""
    while True:
        n = rng.choice(digits)
        value = str(rng.randrange(10 ** (n - 1), 10**n))
        if in_split(f"{subject} {value}", split):
            return value


def cased(rng: random.Random, text: str) -> str:
    """60% lower, 20% Capitalised, 20% UPPER case."""
    return rng.choices((text, text.capitalize(), text.upper()), (3, 1, 1))[0]


def draw_font(rng: random.Random, sizes: Sequence[int]) -> int:
    """A row of the atlas: any face, one of these pixel sizes."""
    return rng.randrange(len(FACES)) * len(PIXELS) + PIXELS.index(rng.choice(sizes))


def layout(rng: random.Random, kind: str, split: str, keys: Sequence[str] = KEYS) -> Page:
    """Draw the content and the places of one page of a kind."""
    size, fill = KINDS[kind]
    page = Page(kind, size, hard=split == "hard")
    page.paper = tuple(rng.randint(225, 255) for _ in range(3))
    page.ink = tuple(rng.randint(0, 70) for _ in range(3))
    page.sign = rng.choice(("", "", "", ":", ":", ".", " -", " ="))
    if kind in ("doc", "sheet", "dense", "zh") and rng.random() < 0.1:
        page.paper, page.ink = page.ink, page.paper
    fill(rng, page, split, keys)
    return page


def _document(rng: random.Random, page: Page, split: str, names: Sequence[str]) -> None:
    k = page.size[0] / 192  # a sheet has more lines and wider gaps, of the same type
    keys = rng.sample(HAN if page.kind == "zh" else names, rng.randint(round(4 * k), round(6 * k)))
    title = rng.random() < 0.2
    font, pitch = draw_font(rng, (12, 13, 13)), page.size[1] / (len(keys) + title)
    column = rng.choice((0, rng.uniform(50 * k, 150 * k)))  # a column of values, or behind keys
    if title:
        x, y = rng.uniform(3, 100 * k), rng.uniform(12, pitch - 4)
        page.items.append(word(cased(rng, rng.choice(TITLES)), x, y, font, 0))
    for row, key in enumerate(keys, start=title):
        x, y = rng.uniform(3, 60 * k), pitch * row + rng.uniform(12, pitch - 4)
        x_value = column + rng.uniform(0, 12) if column else x + rng.uniform(30, 80)
        fact = key, draw_value(rng, key, split, (2, 3, 3))
        page.write(rng, fact, x, min(x_value, page.size[0] - 34), y, font, row)


def _dense(rng: random.Random, page: Page, split: str, names: Sequence[str]) -> None:
    keys = rng.sample(names, 2 * rng.randint(6, 8))
    font, pitch = draw_font(rng, (10, 10, 11)), 384 / len(keys)
    for i, key in enumerate(keys):
        row, side = divmod(i, 2)
        x, y = 96 * side + rng.uniform(2, 14), pitch * row + rng.uniform(pitch - 8, pitch - 4)
        fact = key, draw_value(rng, key, split, (2, 3))
        page.write(rng, fact, x, x + rng.uniform(36, 50), y, font, row)


def _chart(rng: random.Random, page: Page, split: str, names: Sequence[str]) -> None:
    keys = rng.sample(names, rng.randint(4, 6))
    font, pitch = draw_font(rng, (9, 10, 10)), 96 / len(keys)
    thick, start, page.sign = rng.uniform(6, 10), 40, ""
    for row, key in enumerate(keys):
        fact = key, draw_value(rng, key, split, (2,))
        y = pitch * row + pitch / 2 + 4 + rng.uniform(-1.5, 1.5)
        tip = start + 36 * int(fact[1]) / 100
        page.bars.append((start, round(y - 4 - thick / 2), round(tip), round(y - 4 + thick / 2)))
        page.write(rng, fact, rng.uniform(1, 4), tip + rng.uniform(2, 4), y, font, row)


def _info(rng: random.Random, page: Page, split: str, _: Sequence[str]) -> None:
    things = rng.sample(OBJECTS, rng.randint(4, 6))
    font, pitch = draw_font(rng, (10, 11, 12)), 192 / len(things)
    for row, thing in enumerate(things):
        side, y = rng.uniform(18, 24), pitch * row + rng.uniform(2, pitch - 26)
        x = rng.uniform(3, 24)
        page.items.append(Item(thing, (x, y, x + side, y + side), row))
        page.facts.append((thing, draw_value(rng, thing, split, (2, 3))))
        x_value, baseline = rng.uniform(x + side + 5, 66), y + side / 2 + rng.uniform(1, 7)
        page.items.append(word(page.facts[-1][1], x_value, baseline, font, row))


def _scene(rng: random.Random, page: Page, split: str, _: Sequence[str]) -> None:
    while not page.facts or not in_split(str(page.facts), split):
        places = sorted(rng.sample(range(9), rng.randint(2, 4)))
        things = rng.sample(OBJECTS, len(places))
        page.facts = [(PLACES[p], thing) for p, thing in zip(places, things, strict=True)]
    for p, thing in zip(places, things, strict=True):
        side = rng.uniform(19, 27)
        x, y = (32 * cell + rng.uniform(1, 31 - side) for cell in (p % 3, p // 3))
        page.items.append(Item(thing, (x, y, x + side, y + side), p // 3))


def frames(rng: random.Random, split: str, count: int = 4) -> tuple[list[Page], str, str]:
    """Frames of a moving scene: one thing crosses it, one stands; what moves, and which way."""
    while True:
        first = layout(rng, "scene", split)
        moves, stands = first.items[:2]
        way = rng.choice(WAYS)
        across = way in WAYS[:2]  # along x; then the other must stand in another row of cells
        lanes = [round(item.box[across]) // 32 for item in (moves, stands)]
        if lanes[0] != lanes[1]:
            break
    pages, side, far = [], moves.box[2] - moves.box[0], way in ("right", "down")
    for i in range(count):
        at = (94 - side) * (i if far else count - 1 - i) / (count - 1) + 1
        x, y = (at, moves.box[1]) if across else (moves.box[0], at)
        item = Item(moves.text, (x, y, x + side, y + side), 0)
        pages.append(replace(first, items=[item, stands], facts=[]))
    return pages, moves.text, way


KINDS = {
    "doc": ((192, 192), _document),
    "sheet": ((288, 288), _document),
    "zh": ((192, 192), _document),
    "dense": ((192, 192), _dense),
    "chart": ((96, 96), _chart),
    "info": ((96, 192), _info),
    "scene": ((96, 96), _scene),
}

# ------------------------------------------------------------------------------ pixels

# Outlines in hundredths of an object's side.
# fmt: off
OUTLINES = {
    "square": [(6, 6), (94, 6), (94, 94), (6, 94)],
    "triangle": [(50, 4), (98, 94), (2, 94)],
    "star": [(50, 2), (62, 38), (98, 38), (69, 60), (80, 96), (50, 74), (20, 96), (31, 60),
             (2, 38), (38, 38)],
    "cross": [(35, 2), (65, 2), (65, 35), (98, 35), (98, 65), (65, 65), (65, 98), (35, 98),
              (35, 65), (2, 65), (2, 35), (35, 35)],
}
# fmt: on


def paint(image: Image.Image, thing: str, box: Box) -> None:
    """Draw one object, smoothed by drawing it four times too large."""
    colour, shape = thing.split()
    side = max(1, round(box[2] - box[0]))
    mask = Image.new("L", (4 * side, 4 * side))
    pen, k = ImageDraw.Draw(mask), 4 * side / 100
    if shape in OUTLINES:
        pen.polygon([(x * k, y * k) for x, y in OUTLINES[shape]], fill=255)
    else:
        pen.ellipse((2 * k, 2 * k, 98 * k, 98 * k), fill=255)
    if shape == "ring":
        pen.ellipse((28 * k, 28 * k, 72 * k, 72 * k), fill=0)
    image.paste(COLOURS[colour], (round(box[0]), round(box[1])), mask.reduce(4))


def render(page: Page) -> np.ndarray:
    """Pixels uint8[H, W, 3] of a layout."""
    rng = random.Random(str(page.facts))  # of strokes and noise
    image = Image.new("RGB", page.size, page.paper)
    for i, bar in enumerate(page.bars):
        ImageDraw.Draw(image).rectangle(bar, fill=list(COLOURS.values())[(bar[1] + i) % 7])
    cover = np.zeros((page.size[1] + CELL, page.size[0] + CELL), np.uint8)  # ink, 0 to 255
    for item in page.items:
        if not item.drawn:
            paint(image, item.text, item.box)
        y = max(0, round(item.box[3]) - BASELINE)
        for char, edge in zip(item.drawn, item.edges, strict=False):
            x = max(0, round(edge) - 1)
            spot = cover[y : y + CELL, x : x + CELL]
            glyph = atlas()[0][item.font, CHARS.index(char)]
            np.maximum(spot, glyph[: spot.shape[0], : spot.shape[1]], out=spot)
    pixels = np.asarray(image).astype(np.int32)
    share = cover[: page.size[1], : page.size[0], None].astype(np.int32)
    pixels = pixels + (np.array(page.ink) - pixels) * share // 255
    return (spoiled(pixels, rng) if page.hard else pixels).astype(np.uint8)


def spoiled(pixels: np.ndarray, rng: random.Random) -> np.ndarray:
    """Three thin strokes across the page, then noise of 12 levels."""
    height, width = pixels.shape[:2]
    image = Image.fromarray(pixels.astype(np.uint8))
    for _ in range(3):
        ends = [(rng.randrange(width), rng.randrange(height)) for _ in range(2)]
        ImageDraw.Draw(image).line(ends, fill=rng.choice([*COLOURS.values()]), width=1)
    noise = np.random.default_rng(rng.randrange(2**32)).normal(0, 12, pixels.shape)
    return (np.asarray(image) + noise).clip(0, 255)


def visible(page: Page, window: Box) -> list[str]:
    """What can be read inside a window: glyphs by their centres, objects that show mostly."""
    x0, y0, x1, y1 = window
    seen = []
    for item in page.items:
        a, b, c, d = item.box
        if item.drawn and y0 + 2 <= (b + d) / 2 <= y1 - 2:
            centres = [(left + right) / 2 for left, right in zip(item.edges, item.edges[1:])]
            text = "".join(t for t, m in zip(item.text, centres) if x0 + 1 <= m <= x1 - 1)
            if text:
                seen.append(Item(text, item.box, item.row))
        if not item.drawn:
            inside = max(0, min(c, x1) - max(a, x0)) * max(0, min(d, y1) - max(b, y0))
            if inside > 0.7 * (c - a) * (d - b):
                seen.append(item)
    return rows_of(seen)


def crop(rng: random.Random, page: Page) -> tuple[int, int, int, int]:
    """A window of 48 to 64 pixels around a random item (so it reads in one 48-pixel view)."""
    side, (w, h) = rng.choice((48, 48, 56, 64)), page.size
    a, b, c, d = rng.choice(page.items).box
    x = min(max(0, round((a + c) / 2 - side * rng.uniform(0.2, 0.8))), w - side)
    y = min(max(0, round((b + d) / 2 - side * rng.uniform(0.2, 0.8))), h - side)
    return x, y, x + side, y + side


if __name__ == "__main__":
    draw_atlas(sys.argv[1])
