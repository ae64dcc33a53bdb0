"""Stage 0 of the encoder: a small tower learns glyphs, words and objects from dense labels.

The blog starts from encoders that already see. This one learns on random 48x48 windows of nano
pages at all the scales that AnyRes will show it: first the convolutional stem alone names the
glyph under each 4-pixel cell, then the whole tower names, per 8-pixel patch, the glyph in its
left and right half, the key word and the object. The heads are thrown away afterwards.
"""

import random
import string
from pathlib import Path

import numpy as np
import pages
import torch
import torch.nn.functional as F
from fit import fit
from PIL import Image
from torch import Tensor, nn

from nanollava.encoder import ENCODERS, build

R, MARGIN = 48, 16
# phase: steps, learning rate, weight of a digit: the stem alone, then the whole tower, then the
# same once more with an eye on digits, of which none can be foretold from its neighbours
PHASES = {"stem": (2500, 3e-3, 1.0), "dense": (10000, 2e-3, 1.0), "polish": (8000, 1.2e-3, 3.0)}
HEADS = ("stem", "char", "word", "object")
GLYPHS = "\0" + string.ascii_lowercase + string.digits + "".join(pages.HAN)  # 0 is blank
WORDS = ["", *pages.KEYS, *pages.TITLES, *pages.HAN, "#", "?"]  # none, ..., a number, other
KINDS = ("doc", "doc", "doc", "dense", "dense", "dense", "chart", "info", "info", "scene", "zh")
# Scales of the AnyRes grids (4x4, 3x3, 2x2, and 2 of 3) and of the squashed base view.
SCALES = (1, 1, 1, 0.75, 0.75, 0.75, 0.67, 0.5, 0)
UNREADABLE = 3.0  # pixels: lower capitals have no label, or base views would be most of the loss
RENEWED = 4  # pages of the pool that each batch replaces


class Windows:
    """A pool of pages at several scales, from which windows with labels are cut."""

    def __init__(self, rng: random.Random, count: int, split: str):
        self.rng, self.split = rng, split
        self.pool = [self.draw() for _ in range(count)]

    def draw(self) -> tuple[Image.Image, np.ndarray, np.ndarray]:
        """A page's picture and its boxes; some of its keys are words that nobody knows."""
        made = ["".join(self.rng.choices(GLYPHS[1:27], k=self.rng.randint(2, 5))) for _ in range(8)]
        page = pages.layout(self.rng, self.rng.choice(KINDS), self.split, [*pages.KEYS, *made])
        return Image.fromarray(pages.render(page)), *boxes(page)

    def cut(self, scale: float | None = None) -> tuple[np.ndarray, ...]:
        """A window uint8[R, R, 3] and its labels: stem [12, 12], halves [6, 12], word, object."""
        image, glyphs, things = self.rng.choice(self.pool)
        if scale is None:  # any picture is scaled a little differently
            scale = self.rng.choice(SCALES) * self.rng.uniform(0.88, 1.15)
            scale *= 1.4 if self.rng.random() < 0.05 else 1
        sx, sy = (scale, scale) if scale else (R / image.width, R / image.height)
        w, h = image.width * sx, image.height * sy
        a, b, c, d = self.rng.choice([*glyphs[:, :4], *things[:, :4]])  # look at something
        slack = MARGIN if scale else 0  # black beside a page
        x = (a + c) / 2 * sx - self.rng.uniform(0, R)
        y = (b + d) / 2 * sy - self.rng.uniform(0, R)
        x = min(max(x, -slack), max(0, w - R + slack))
        y = min(max(y, -slack), max(0, h - R + slack))
        x, y = round(x), round(y)
        view = np.zeros((R, R, 3), np.uint8)
        x0, y0 = max(0, x), max(0, y)
        x1, y1 = min(x + R, round(w)), min(y + R, round(h))
        source = (x0 / sx, y0 / sy, min(x1 / sx, image.width), min(y1 / sy, image.height))
        part = image.resize((x1 - x0, y1 - y0), Image.BICUBIC, source)
        view[y0 - y : y1 - y, x0 - x : x1 - x] = np.asarray(part)
        move = np.array([x, y, x, y])
        zoom = np.array([sx, sy, sx, sy])
        return view, *labels(glyphs, things, zoom, move)

    def batch(self, n: int, scale: float | None = None) -> list[Tensor]:
        """n windows uint8[n, 3, R, R] and their labels."""
        for _ in range(RENEWED):
            self.pool[self.rng.randrange(len(self.pool))] = self.draw()
        rows = [self.cut(scale) for _ in range(n)]
        views, *marks = (torch.from_numpy(np.stack(column)) for column in zip(*rows, strict=True))
        return [views.permute(0, 3, 1, 2).contiguous(), *marks]


def boxes(page: pages.Page) -> tuple[np.ndarray, np.ndarray]:
    """Rows (x0, y0, x1, y1, class, word, word x0, word x1) of glyphs; (box, object) of objects."""
    glyphs, things = [], []
    for item in page.items:
        a, b, c, d = item.box
        if not item.drawn:
            things.append((a, b, c, d, 1 + pages.OBJECTS.index(item.text)))
            continue
        name = item.text if item.text in WORDS else "#" if item.text.isdigit() else "?"
        for char, left, right in zip(item.text, item.edges, item.edges[1:], strict=False):
            glyphs.append((left, b, right, d, GLYPHS.index(char), WORDS.index(name), a, c))
    return np.array(glyphs).reshape(-1, 8), np.array(things).reshape(-1, 5)


def labels(
    glyphs: np.ndarray, things: np.ndarray, zoom: np.ndarray, move: np.ndarray
) -> tuple[np.ndarray, ...]:
    """Dense labels of the window at `move` of a page zoomed by `zoom`; -100 where it is unclear."""
    stem, halves = np.zeros((12, 12), np.int64), np.zeros((6, 12), np.int64)
    names, objects = np.zeros((6, 6), np.int64), np.zeros((6, 6), np.int64)
    box = glyphs[:, :4] * zoom - move
    cx, cy, h = box[:, ::2].mean(1), box[:, 1::2].mean(1), box[:, 3] - box[:, 1]
    span = (glyphs[:, 6:] * zoom[0] - move[0]).clip(0, R)
    share = (span[:, 1] - span[:, 0]) / ((glyphs[:, 7] - glyphs[:, 6]) * zoom[0])
    inside = (cx > 0) & (cx < R) & (cy > 0) & (cy < R)
    for i in np.flatnonzero(inside):
        char, column, row = int(glyphs[i, 4]), int(cx[i] // 4), int(cy[i] // 8)
        char = char if h[i] > UNREADABLE else -100
        for y in (cy[i] - h[i] / 4, cy[i] + h[i] / 4):
            if 0 <= y < R:
                stem[int(y // 4), column] = char
        halves[row, column] = char
        names[row, column // 2] = int(glyphs[i, 5]) if share[i] > 0.6 and char > 0 else -100
    spots = np.arange(4, R, 8)
    for x0, y0, x1, y1, kind in np.hstack([things[:, :4] * zoom - move, things[:, 4:]]):
        rows, columns = (spots > y0) & (spots < y1), (spots > x0) & (spots < x1)
        objects[np.ix_(rows, columns)] = int(kind)
    return stem, halves, names, objects


class Sight(nn.Module):
    """An encoder of nanollava with four throw-away heads."""

    def __init__(self, name: str):
        super().__init__()
        row = ENCODERS[name]
        self.encoder = build(row, "random")
        self.stem = self.encoder.visual.conv1[:6]  # up to 4-pixel cells
        self.on_stem = nn.Conv2d(row.stem[-1], len(GLYPHS), 1)
        self.glyph = nn.Linear(row.width, 2 * len(GLYPHS))
        self.word = nn.Linear(row.width, len(WORDS))
        self.thing = nn.Linear(row.width, 1 + len(pages.OBJECTS))

    def forward(self, views: Tensor) -> tuple[Tensor, ...]:
        """uint8[N, 3, R, R] -> logits [N, 12, 12, .] of stem, [N, 6, 12, .] of halves,
        [N, 6, 6, .] of word and object."""
        cells = []
        hook = self.stem[-1].register_forward_hook(lambda _, __, out: cells.append(out))
        seen = self.encoder(views).unflatten(1, (6, 6))  # (N, 6, 6, C)
        hook.remove()
        halves = self.glyph(seen).unflatten(-1, (2, -1)).flatten(2, 3)
        return self.on_stem(cells[0]).permute(0, 2, 3, 1), halves, self.word(seen), self.thing(seen)


def entropy(logits: Tensor, target: Tensor, digit: float = 1.0) -> Tensor:
    """Cross entropy in which blank (class 0), by far the most frequent, weighs a fifth, and a
    digit `digit`.
    """
    weight = torch.ones(logits.shape[-1])
    weight[0] = 0.2
    if digit != 1:
        weight[GLYPHS.index("0") : GLYPHS.index("9") + 1] = digit
    return F.cross_entropy(logits.flatten(0, -2).float(), target.flatten(), weight)


def hits(logits: Tensor, target: Tensor) -> float:
    """Accuracy where something is to be seen."""
    some = target > 0
    return (logits.argmax(-1)[some] == target[some]).float().mean().item() if some.any() else 0.0


def accuracy(out: tuple[Tensor, ...], targets: list[Tensor]) -> dict[str, float]:
    """hits of each head."""
    return {head: hits(o, t) for head, o, t in zip(HEADS, out, targets, strict=True)}


def train(size: str, folder: Path, seed: int = 0) -> tuple[Sight, dict]:
    """All phases, glyphs in the stem and then everything; returns the model and its records."""
    torch.manual_seed(seed)
    name = f"nano_{size}"
    model, windows = Sight(name), Windows(random.Random(f"sight {seed}"), 3000, "train")

    def stem_loss(_: int) -> tuple[Tensor, dict]:
        views, cells, *_ = windows.batch(64)
        pixels = (views - model.encoder.mean) / model.encoder.std
        out = model.on_stem(model.stem(pixels)).permute(0, 2, 3, 1)
        return entropy(out, cells), {"glyph": hits(out, cells)}

    def dense_loss(digit: float) -> tuple[Tensor, dict]:
        views, *targets = windows.batch(64)
        out = model(views)
        weights = (digit, digit, 1.0, 1.0)
        losses = [entropy(*each) for each in zip(out, targets, weights, strict=True)]
        return sum(losses[1:]) + 0.5 * losses[0], accuracy(out, targets)

    records = {}
    for phase, (steps, lr, digit) in PHASES.items():
        windows.rng.seed(f"sight {seed} {phase}")  # the same windows if earlier phases are skipped
        loss = stem_loss if phase == "stem" else lambda _, digit=digit: dense_loss(digit)
        records[phase] = fit(f"{name}_{phase}", model, loss, steps, lr, folder)
    return model, records


@torch.no_grad()
def scores(model: Sight, n: int = 512) -> dict:
    """Accuracy of char, word and object on windows of test pages, by scale (0 = base view)."""
    windows, found = Windows(random.Random("sight test"), 300, "test"), {}
    for scale in (1, 0.75, 0.67, 0.5, 0):
        views, *targets = windows.batch(n, scale)
        out = model(views)
        found[str(scale)] = {k: round(v, 3) for k, v in accuracy(out, targets).items()}
    return found
