"""The nano world: pages drawn from numbers; their text reads in tiles, not in the base view.

    page = layout(random.Random(0), "doc", "train")     # what stands where
    pixels = render(page)                               # uint8[H, W, 3]
    page.lines() -> ["tax 305", "fee 21", ...]          # what is true about it

Native sizes (width x height): documents 192x192 (legible at 3x3 tiles of 48, hurt at 2x2,
unreadable in one view), charts and scenes 96x96, info pages 96x192. A layout knows the place of
every glyph, so that stage 0 can label pixels and write text twins without drawing.

The sources (`path: nano/world.py:NAME` in a recipe) are the functions
`NAME(split, count, seed) -> records` at the end: short_captions, transcriptions, detailed,
instructions to train on; doc, dense, chart, info, presence, choice, transcribe, caption to score.
A training answer restates its key ("tax 305"); an evaluation record also has `answer`, the value
alone ("305"): score the LAST WORD of a prediction against it. For `transcribe` the answer is the
whole text, for `caption` the facts, one per line, to be looked for among a prediction's lines.
"""

import io
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from zlib import crc32

import numpy as np
from PIL import Image, ImageDraw, PngImagePlugin

VERSION = "nano-1"
KEYS = ["tax", "fee", "rent", "cost", "date", "room", "gate", "seat", "bus", "code", "desk", "unit",
        "item", "size", "team", "tip", "ward", "shop", "mile", "zone", "bill", "debt", "loan",
        "fund"]
COLOURS = {"red": (214, 40, 40), "green": (40, 150, 60), "blue": (40, 80, 220),
           "yellow": (240, 205, 30), "purple": (130, 50, 160), "orange": (245, 135, 20),
           "cyan": (40, 195, 215), "black": (30, 30, 30)}
SHAPES = ["circle", "square", "triangle", "star", "cross", "ring"]
FOODS = ["plum", "corn", "fish", "rice", "nuts", "leaf", "bread", "egg", "apple", "bean", "milk",
         "cake"]
OBJECTS = [f"{colour} {shape}" for colour in COLOURS for shape in SHAPES]
# 48 facts that no picture shows: an LLM must know them. Not a rule of colour and shape.
EATS = {thing: random.Random(f"eats {thing}").choice(FOODS) for thing in OBJECTS}
PLACES = [f"{row} {column}" for row in ("top", "middle", "bottom")
          for column in ("left", "centre", "right")]
SIZES = {"doc": (192, 192), "dense": (192, 192), "chart": (96, 96), "info": (96, 192),
         "scene": (96, 96)}
NAMES = {"doc": "a page", "dense": "a full page", "chart": "a chart", "info": "a list",
         "scene": "a scene"}
# A fact "key value" belongs to one split for good: no pair is ever seen in two of them.
SHARES = {"train": range(14), "val": range(14, 16), "test": range(16, 18), "tuning": range(18, 20)}

FACES = ("DejaVuSans", "DejaVuSansMono-Bold", "DejaVuSerif-Bold")
PIXELS = (9, 10, 11, 12, 13)
ASCII = "".join(map(chr, range(32, 127)))
CELL_W, CELL_H, BASELINE = 18, 18, 13
ATLAS = Path(__file__).with_name("atlas.png")


# ------------------------------------------------------------------------------ glyphs

def draw_atlas(path: Path = ATLAS) -> None:
    """Draw every ASCII glyph, one row per face and size, from the fonts inside matplotlib."""
    import matplotlib
    from PIL import ImageFont

    fonts = Path(matplotlib.get_data_path(), "fonts/ttf")
    atlas = Image.new("L", (CELL_W * len(ASCII), CELL_H * len(FACES) * len(PIXELS)))
    advances = []
    for row, (face, size) in enumerate((face, size) for face in FACES for size in PIXELS):
        font = ImageFont.truetype(str(fonts / f"{face}.ttf"), size)
        for column, char in enumerate(ASCII):
            spot = (column * CELL_W + 1, row * CELL_H + BASELINE)
            ImageDraw.Draw(atlas).text(spot, char, fill=255, font=font, anchor="ls")
        advances.append([round(font.getlength(char), 2) for char in ASCII])
    note = PngImagePlugin.PngInfo()
    note.add_text("advances", json.dumps(advances))
    atlas.save(path, pnginfo=note, optimize=True)


@cache
def atlas() -> tuple[np.ndarray, list[list[float]]]:
    """Ink of each glyph uint8[faces*sizes, 95, CELL_H, CELL_W], and advances in pixels."""
    image = Image.open(ATLAS)
    ink = np.asarray(image).reshape(-1, CELL_H, len(ASCII), CELL_W).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(ink), json.loads(image.text["advances"])


@dataclass
class Item:
    """One printed word (with its glyphs) or one object, at its place on a page."""
    text: str                                # lower case, as a transcription has it
    box: tuple[float, float, float, float]   # x0, y0, x1, y1 in pixels
    row: int                                 # its line in reading order
    drawn: str = ""                          # the letters as printed; "" for an object
    font: int = 0                            # row of the atlas
    edges: list[float] = field(default_factory=list)  # n+1 x positions around n glyphs


@dataclass
class Page:
    """A layout: everything that is true about a picture, before any pixel."""
    kind: str
    size: tuple[int, int]                    # width, height
    items: list[Item]
    facts: list[tuple[str, str]]             # (subject, value); a scene: (place, object)
    paper: tuple[int, int, int] = (255, 255, 255)
    ink: tuple[int, int, int] = (0, 0, 0)
    bars: list[tuple[int, int, int, int]] = field(default_factory=list)

    def lines(self) -> list[str]:
        """What the page says, line by line in reading order; a scene says where things are."""
        if self.kind == "scene":
            return [f"{place} {thing}" for place, thing in self.facts]
        return rows_of(self.items)


def rows_of(items: list[Item]) -> list[str]:
    """Texts of items joined by row, left to right."""
    rows: dict[int, list[Item]] = {}
    for item in items:
        rows.setdefault(item.row, []).append(item)
    return [" ".join(i.text for i in sorted(rows[r], key=lambda i: i.box[0])) for r in sorted(rows)]


def word(text: str, x: float, baseline: float, font: int, row: int) -> Item:
    """An item for a word whose first glyph starts at x (any real number)."""
    advances, edges = atlas()[1][font], [x]
    for char in text:
        edges.append(edges[-1] + advances[ord(char) - 32])
    height = 0.73 * PIXELS[font % len(PIXELS)]        # DejaVu's capitals and digits
    box = (x, baseline - height, edges[-1], baseline)
    return Item(text.lower(), box, row, text, font, edges)


# ------------------------------------------------------------------------------ layouts

def in_split(fact: str, split: str) -> bool:
    """Whether a fact may be shown in a split."""
    return crc32(fact.encode()) % 20 in SHARES[split]


def draw_value(rng: random.Random, subject: str, split: str, digits: tuple[int, ...]) -> str:
    """A number for a subject, out of those that belong to the split."""
    while True:
        n = rng.choice(digits)
        value = str(rng.randrange(10 ** (n - 1), 10 ** n))
        if in_split(f"{subject} {value}", split):
            return value


def cased(rng: random.Random, text: str) -> str:
    """60% lower, 20% Capitalised, 20% UPPER case."""
    return rng.choices((text, text.capitalize(), text.upper()), (3, 1, 1))[0]


def draw_font(rng: random.Random, sizes: tuple[int, ...]) -> int:
    """A row of the atlas: any face, one of these pixel sizes."""
    return rng.randrange(len(FACES)) * len(PIXELS) + PIXELS.index(rng.choice(sizes))


def layout(rng: random.Random, kind: str, split: str, keys: Sequence[str] = KEYS) -> Page:
    """Draw the content and the places of one page of a kind."""
    page = Page(kind, SIZES[kind], [], [])
    page.paper = tuple(rng.randint(225, 255) for _ in range(3))
    page.ink = tuple(rng.randint(0, 70) for _ in range(3))
    {"doc": _document, "dense": _dense, "chart": _chart, "info": _info,
     "scene": _scene}[kind](rng, page, split, keys)
    return page


def _pair(rng: random.Random, page: Page, key: str, value: str, font: int, row: int,
          x: float, x_value: float, y: float) -> None:
    """Print a key at x and its value at x_value or just behind the key."""
    page.items.append(word(cased(rng, key), x, y, font, row))
    x_value = max(x_value, page.items[-1].box[2] + 4)
    page.items.append(word(value, x_value, y, font, row))
    page.facts.append((key, value))


def _document(rng: random.Random, page: Page, split: str, names: Sequence[str]) -> None:
    keys = rng.sample(names, rng.randint(4, 6))
    font, pitch = draw_font(rng, (10, 11, 11, 12)), 192 / len(keys)
    column = rng.choice((0, rng.uniform(50, 150)))    # values in a column, or behind their keys
    for row, key in enumerate(keys):
        x, y = rng.uniform(3, 60), pitch * row + rng.uniform(12, pitch - 4)
        x_value = column + rng.uniform(0, 12) if column else x + rng.uniform(30, 80)
        value = draw_value(rng, key, split, (2, 3))
        _pair(rng, page, key, value, font, row, x, x_value, y)


def _dense(rng: random.Random, page: Page, split: str, names: Sequence[str]) -> None:
    keys = rng.sample(names, 2 * rng.randint(6, 8))
    font, pitch = draw_font(rng, (10, 10, 11)), 384 / len(keys)
    for i, key in enumerate(keys):
        row, side = divmod(i, 2)
        x, y = 96 * side + rng.uniform(2, 16), pitch * row + rng.uniform(pitch - 8, pitch - 4)
        value = draw_value(rng, key, split, (2, 3))
        _pair(rng, page, key, value, font, row, x, x + rng.uniform(36, 50), y)


def _chart(rng: random.Random, page: Page, split: str, names: Sequence[str]) -> None:
    keys = rng.sample(names, rng.randint(4, 6))
    font, pitch = draw_font(rng, (9, 10, 10)), 96 / len(keys)
    bar_h, start = rng.uniform(6, 10), 40
    page.bars = []
    for row, key in enumerate(keys):
        value = draw_value(rng, key, split, (2,))
        y = pitch * row + pitch / 2 + 4 + rng.uniform(-1.5, 1.5)
        end = start + 36 * int(value) / 100
        page.bars.append((start, round(y - 4 - bar_h / 2), round(end), round(y - 4 + bar_h / 2)))
        _pair(rng, page, key, value, font, row, rng.uniform(1, 4), end + rng.uniform(2, 4), y)


def _info(rng: random.Random, page: Page, split: str, names: Sequence[str]) -> None:
    things = rng.sample(OBJECTS, rng.randint(4, 6))
    font, pitch = draw_font(rng, (10, 11, 12)), 192 / len(things)
    for row, thing in enumerate(things):
        side, y = rng.uniform(18, 24), pitch * row + rng.uniform(2, pitch - 26)
        x = rng.uniform(3, 24)
        page.items.append(Item(thing, (x, y, x + side, y + side), row))
        value = draw_value(rng, thing, split, (2, 3))
        x_value = rng.uniform(x + side + 5, 68)
        page.items.append(word(value, x_value, y + side / 2 + rng.uniform(1, 7), font, row))
        page.facts.append((thing, value))


def _scene(rng: random.Random, page: Page, split: str, names: Sequence[str]) -> None:
    while not page.facts or not in_split(str(page.facts), split):
        places = sorted(rng.sample(range(9), rng.randint(2, 4)))
        things = rng.sample(OBJECTS, len(places))
        page.facts = [(PLACES[p], thing) for p, thing in zip(places, things, strict=True)]
    for p, thing in zip(places, things, strict=True):
        side = rng.uniform(19, 27)
        x, y = (32 * cell + rng.uniform(1, 31 - side) for cell in (p % 3, p // 3))
        page.items.append(Item(thing, (x, y, x + side, y + side), p // 3))


# ------------------------------------------------------------------------------ pixels

_STAR = [(50, 2), (62, 38), (98, 38), (69, 60), (80, 96), (50, 74), (20, 96), (31, 60), (2, 38),
         (38, 38)]
_CROSS = [(35, 2), (65, 2), (65, 35), (98, 35), (98, 65), (65, 65), (65, 98), (35, 98), (35, 65),
          (2, 65), (2, 35), (35, 35)]
_OUTLINES = {"square": [(6, 6), (94, 6), (94, 94), (6, 94)], "star": _STAR, "cross": _CROSS,
             "triangle": [(50, 4), (98, 94), (2, 94)]}


def paint(image: Image.Image, thing: str, box: tuple[float, float, float, float]) -> None:
    """Draw one object, smoothed by drawing it four times too large."""
    colour, shape = thing.split()
    side = max(1, round(box[2] - box[0]))
    mask = Image.new("L", (4 * side, 4 * side))
    pen, k = ImageDraw.Draw(mask), 4 * side / 100
    if shape in ("circle", "ring"):
        pen.ellipse((2 * k, 2 * k, 98 * k, 98 * k), fill=255)
        if shape == "ring":
            pen.ellipse((28 * k, 28 * k, 72 * k, 72 * k), fill=0)
    else:
        pen.polygon([(x * k, y * k) for x, y in _OUTLINES[shape]], fill=255)
    image.paste(COLOURS[colour], (round(box[0]), round(box[1])), mask.reduce(4))


def render(page: Page) -> np.ndarray:
    """Pixels uint8[H, W, 3] of a layout."""
    image = Image.new("RGB", page.size, page.paper)
    for i, bar in enumerate(page.bars):
        ImageDraw.Draw(image).rectangle(bar, fill=list(COLOURS.values())[(bar[1] + i) % 7])
    for item in page.items:
        if not item.drawn:
            paint(image, item.text, item.box)
    cover = np.zeros((page.size[1] + CELL_H, page.size[0] + CELL_W), np.uint8)
    for item in page.items:
        y = max(0, round(item.box[3]) - BASELINE)
        for char, edge in zip(item.drawn, item.edges[:-1], strict=False):
            x = max(0, round(edge) - 1)
            spot = cover[y:y + CELL_H, x:x + CELL_W]
            np.maximum(spot, atlas()[0][item.font, ord(char) - 32][:spot.shape[0], :spot.shape[1]],
                       out=spot)
    pixels = np.asarray(image).astype(np.int16)
    share = cover[:page.size[1], :page.size[0], None].astype(np.int16)
    return (pixels + (np.array(page.ink, np.int16) - pixels) * share.astype(np.int32) // 255
            ).astype(np.uint8)


def png(pixels: np.ndarray) -> bytes:
    """PNG bytes of uint8[H, W, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "png", compress_level=1)
    return buffer.getvalue()


def visible(page: Page, window: tuple[float, float, float, float]) -> list[str]:
    """What can be read inside x0, y0, x1, y1: glyphs by their centres, objects shown mostly."""
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


# ------------------------------------------------------------------------------ language

ASK = {
    "value": ("What is the {}?", "what is the {}?", "How much is the {}?", "Read the {}.",
              "What does it say for {}?"),
    "bar": ("What is the value of {}?", "what is the value of {}?", "How much is {}?",
            "What is the {}?"),
    "number": ("What is the number of the {}?", "what is the number of the {}?",
               "Which number does the {} have?", "How much is the {}?"),
    "where": ("What is at the {}?", "what is at the {}?", "Which thing is at the {}?"),
    "eats": ("What does the {} thing eat?", "what does the {} thing eat?",
             "What is the food of the {} thing?"),
    "presence": ("Is there {}?", "is there {}?", "Do you see {}?"),
    "knows": ("What does {} eat?", "what does {} eat?", "What is the food of {}?"),
    "choice": ("What does the {} thing eat?\n{}\nAnswer with the letter.",),
    "transcribe": ("Read the text.", "Transcribe the image.", "What does the image say?"),
    "detail": ("Describe the image in detail.", "describe the image in detail."),
    "brief": ("Describe the image briefly.", "describe the image briefly."),
}
QUESTION = {"doc": "value", "dense": "value", "chart": "bar", "info": "number", "scene": "where"}


def ask(rng: random.Random | None, form: str, *parts: str) -> str:
    """A question of a form; without a generator its first wording, which evaluation uses."""
    if not rng:
        return ASK[form][0].format(*parts)
    subject = cased(rng, parts[0]) if parts and rng.random() < 0.2 else "".join(parts[:1])
    return rng.choice(ASK[form]).format(subject, *parts[1:])


def a_(thing: str) -> str:
    """The thing with its article."""
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def draw_presence(rng: random.Random, page: Page) -> tuple[str, str]:
    """An object and yes or no; a negative shares neither colour nor shape with the scene."""
    shown = [thing for _, thing in page.facts]
    if rng.random() < 0.5:
        return rng.choice(shown), "yes"
    parts = {part for thing in shown for part in thing.split()}
    return rng.choice([o for o in OBJECTS if not parts & set(o.split())]), "no"


def draw_choice(rng: random.Random, thing: str) -> tuple[str, str]:
    """Four foods with letters, and the letter of what the thing eats."""
    options = rng.sample([food for food in FOODS if food != EATS[thing]], 3)
    options.insert(rng.randrange(4), EATS[thing])
    letters = dict(zip("ABCD", options, strict=True))
    text = " ".join(f"{letter} {food}" for letter, food in letters.items())
    return text, "ABCD"[options.index(EATS[thing])]


def short_caption(rng: random.Random, page: Page) -> str:
    """One or two true things."""
    facts = rng.sample(page.facts, min(len(page.facts), rng.randint(1, 2)))
    told = [a_(b) if page.kind == "scene" else f"{a} {b}" for a, b in facts]
    return f"{NAMES[page.kind]} with " + " and ".join(told)


def detailed_caption(page: Page) -> str:
    """Everything, one fact or printed line per line."""
    return "\n".join([NAMES[page.kind], *page.lines()])


def questions(rng: random.Random | None, page: Page, pick: random.Random) -> list[tuple[str, ...]]:
    """All (form, question, answer, value) about a page; `pick` draws what is asked."""
    found = [(page.kind, ask(rng, QUESTION[page.kind], a), f"{a} {b}", b) for a, b in page.facts]
    if page.kind == "scene":
        for place, thing in page.facts:
            fact = f"{thing} eats {EATS[thing]}"
            found.append(("eats", ask(rng, "eats", place), fact, EATS[thing]))
            options, letter = draw_choice(pick, thing)
            found.append(("choice", ask(rng, "choice", place, options), f"{fact} {letter}", letter))
        for _ in page.facts:
            thing, answer = draw_presence(pick, page)
            found.append(("presence", ask(rng, "presence", a_(thing)), answer, answer))
    else:
        text = "\n".join(page.lines())
        found.append(("transcribe", ask(rng, "transcribe"), text, text))
    facts = "\n".join(page.lines())
    found.append(("caption", ask(rng, "detail"), detailed_caption(page), facts))
    return found


# ------------------------------------------------------------------------------ sources

def _record(name: str, split: str, seed: int, i: int, pixels: np.ndarray,
            turns: list[tuple[str, str]], **more: str) -> dict:
    """One record of a source; the picture stands in the first question."""
    talk = []
    for n, (question, answer) in enumerate(turns):
        value = f"<image>\n{question}" if n == 0 else question
        talk += [{"from": "human", "value": value}, {"from": "gpt", "value": answer}]
    return {"id": f"{VERSION}/{name}/{split}/{seed}/{i}", "image": png(pixels),
            "conversations": talk, "source": f"nano/{name}", **more}


def _pages(name: str, split: str, count: int, seed: int,
           kinds: tuple[str, ...]) -> Iterator[tuple[int, random.Random, Page]]:
    """Numbered layouts, each with its own generator: the same for the same arguments."""
    for i in range(count):
        rng = random.Random(f"{VERSION}/{name}/{split}/{seed}/{i}")
        yield i, rng, layout(rng, rng.choice(kinds), split)


MIX = ("doc", "doc", "dense", "chart", "info", "info", "scene", "scene", "scene")


def short_captions(split: str, count: int, seed: int) -> Iterator[dict]:
    """Whole pages with one or two true things about them (the blog's raw web captions)."""
    for i, rng, page in _pages("short_captions", split, count, seed, MIX):
        turn = (ask(rng, "brief"), short_caption(rng, page))
        yield _record("short_captions", split, seed, i, render(page), [turn])


def crop(rng: random.Random, page: Page) -> tuple[int, int, int, int]:
    """A window of 48 to 64 pixels around a random item (so it reads in one 48-pixel view)."""
    side, (w, h) = rng.choice((48, 48, 56, 64)), page.size
    a, b, c, d = rng.choice(page.items).box
    x = min(max(0, round((a + c) / 2 - side * rng.uniform(0.2, 0.8))), w - side)
    y = min(max(0, round((b + d) / 2 - side * rng.uniform(0.2, 0.8))), h - side)
    return x, y, x + side, y + side


def transcriptions(split: str, count: int, seed: int) -> Iterator[dict]:
    """Small crops with what can be read in them, for stage 1's single squashed view."""
    for i, rng, page in _pages("transcriptions", split, count, seed, MIX):
        x0, y0, x1, y1 = window = crop(rng, page)
        turn = (ask(rng, "transcribe"), "\n".join(visible(page, window)))
        yield _record("transcriptions", split, seed, i, render(page)[y0:y1, x0:x1], [turn])


def detailed(split: str, count: int, seed: int) -> Iterator[dict]:
    """Whole pages with everything that they say: detailed captions and transcriptions."""
    for i, rng, page in _pages("detailed", split, count, seed, MIX):
        turn = (ask(rng, "detail"), detailed_caption(page))
        if page.kind != "scene" and rng.random() < 0.5:
            turn = (ask(rng, "transcribe"), "\n".join(page.lines()))
        yield _record("detailed", split, seed, i, render(page), [turn])


def instructions(split: str, count: int, seed: int) -> Iterator[dict]:
    """Four to eight questions of all kinds about one page."""
    for i, rng, page in _pages("instructions", split, count, seed, MIX):
        yield _record("instructions", split, seed, i, render(page), turns_about(rng, page))


def text_only(split: str, count: int, seed: int) -> Iterator[dict]:
    """Three to six facts without a picture; the facts are the same in every split."""
    for i in range(count):
        rng = random.Random(f"{VERSION}/text_only/{split}/{seed}/{i}")
        talk = [{"from": who, "value": text} for turn in facts_told(rng, rng.randint(3, 6))
                for who, text in zip(("human", "gpt"), turn, strict=True)]
        yield {"id": f"{VERSION}/text_only/{split}/{seed}/{i}", "image": None,
               "conversations": talk, "source": "nano/text_only"}


def facts_told(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Questions and answers about what n things eat."""
    return [(ask(rng, "knows", a_(thing)), f"{thing} eats {EATS[thing]}")
            for thing in rng.sample(OBJECTS, n)]


def turns_about(rng: random.Random, page: Page) -> list[tuple[str, str]]:
    """Four to eight of a page's questions with answers."""
    asked = questions(rng, page, rng)
    chosen = rng.sample(asked, min(len(asked), rng.randint(4, 8)))
    return [(question, answer) for _, question, answer, _ in chosen]


def _task(name: str, kind: str):
    """An evaluation source: one question of one form per page."""
    def task(split: str, count: int, seed: int) -> Iterator[dict]:
        for i, rng, page in _pages(name, split, count, seed, (kind,)):
            asked = [q for q in questions(None, page, rng) if q[0] == name]
            _, question, restated, value = rng.choice(asked)
            turn = [(question, restated)]
            yield _record(name, split, seed, i, render(page), turn, answer=value)
    task.__doc__ = f"One question of the form {name!r} per {kind} page; `answer` is the value."
    return task


doc, dense, chart, info = (_task(kind, kind) for kind in ("doc", "dense", "chart", "info"))
presence, choice, caption = (_task(name, "scene") for name in ("presence", "choice", "caption"))
transcribe = _task("transcribe", "doc")

if __name__ == "__main__":
    draw_atlas()
