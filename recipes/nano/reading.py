"""Stage 0 of the LLM: a tiny Qwen2 learns to look things up, to talk, and to read patch rasters.

The blog starts from an LLM that was pretrained on the web. A model of this size learns in-context
look-up only from an order of exercises, each of which was needed (three phases):
    A  repeated random sequences over few symbols, then more; strings whose next symbol needs two
       symbols of context; shuffled records "key value" with questions.
    B  text twins of nano pages with conversations about them, facts, presence, choice.
    C  rasters: one token per 8x8 patch, in the order in which the VLM will show its visual
       tokens (base view, then the tiles' rows, a newline behind each), and plain transcriptions.
Every fourth batch of B and C asks only whether such a thing is in a scene: among longer answers
these short ones weigh too little in the mean and stay a guess.
No picture is involved. All of it in the chat template of stage 2 or in `plain`, as stage 1 has it.
"""

import random
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import pages
import torch
import torch.nn.functional as F
import vocabulary
import world
from fit import fit
from pages import Page, layout
from torch import Tensor
from transformers import Qwen2Config, Qwen2ForCausalLM

import nanollava.llm  # noqa: F401 (registers the packed attention)

# width, blocks, MLP width, heads of 16 channels (with 4 heads of 24, M stayed at 85% in phase A),
# and how many times the steps: S masters repetition late
SIZES = {"s": (64, 2, 176, 4, 2), "m": (96, 3, 256, 6, 1), "l": (144, 4, 384, 9, 1)}
# phase: steps, learning rate, the share of it that is left at the phase's end
PHASES = {"A": (1300, 2.5e-3, 1.0), "B": (1600, 2.5e-3, 0.4), "C": (3600, 2e-3, 0.03)}
MIX = (*world.MIX, *world.MIX, "zh")
Row = tuple[list[int], list[bool]]  # ids, and which of them are learned

TOKENIZER = vocabulary.build()


@cache
def ids(text: str) -> tuple[int, ...]:
    """Tokens of a text; typed special tokens stay text."""
    return tuple(TOKENIZER(text, add_special_tokens=False, split_special_tokens=True).input_ids)


END, START, PAD = (
    TOKENIZER.convert_tokens_to_ids(t) for t in ("<|im_end|>", "<|im_start|>", "<|endoftext|>")
)
(LINE,), (BLANK,), (DOT,) = ids("\n"), ids(" "), ids(".")
SYSTEM, USER, ASSISTANT = (ids(part) for part in vocabulary.TEMPLATE)
PAIR = {text: TOKENIZER.convert_tokens_to_ids(text) for text in vocabulary.PAIRS}
DIGITS = [ids(d)[0] for d in "0123456789"]
NAMES = [ids(f"{word} ")[0] for word in vocabulary.words()]
KEYS = [ids(f"{key} ")[0] for key in pages.KEYS]
TOKENS = [
    *DIGITS,
    *KEYS,
    *sorted({*NAMES} - {*KEYS}),
    *(ids(w)[0] for w in vocabulary.words()),
    *(ids(w.upper())[0] for w in vocabulary.words()),
    *(ids(f"{sign} ")[0] for sign in pages.HAN),
]


def build(size: str) -> Qwen2ForCausalLM:
    """A Qwen2 of a nano size (hidden, layers, MLP, heads) with random weights."""
    hidden, layers, mlp, heads, _ = SIZES[size]
    return Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=-(-len(TOKENIZER) // 8) * 8,
            hidden_size=hidden,
            num_hidden_layers=layers,
            intermediate_size=mlp,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            tie_word_embeddings=True,
            max_position_embeddings=4096,
            initializer_range=0.05,
            bos_token_id=None,
            eos_token_id=END,
            pad_token_id=PAD,
            attn_implementation="packed",
        )
    )


def chat(turns: list[tuple[str, str]], seen: list[int] | None = None) -> Row:
    """Turns in the ChatML template; `seen` stands where the visual tokens will stand."""
    row, learned = [START, *SYSTEM, END, LINE], []
    for n, (question, answer) in enumerate(turns):
        shown = [*seen, LINE] if seen and n == 0 else []
        row += [START, *USER, *shown, *ids(question), END, LINE, START, *ASSISTANT]
        learned += [False] * (len(row) - len(learned))
        row += [*ids(answer), END]
        learned += [True] * (len(row) - len(learned))
        row.append(LINE)
        learned.append(False)
    return row, learned


def plain(seen: list[int], text: str) -> Row:
    """What is seen, directly followed by its text."""
    answer = [*ids(text), LINE]
    return [*seen, *answer], [False] * len(seen) + [True] * len(answer)


# ------------------------------------------------------------------------------ phase A


def repeat(rng: random.Random, symbols: int) -> Row:
    """A random string twice: the second time can be foretold from the first.

    Symbols recur in it, so that one symbol of context does not always suffice.
    """
    part = rng.choices(TOKENS[:symbols], k=rng.randint(20, 30))
    return part * 2, [False] * (len(part) + 1) + [True] * (len(part) - 1)


def ambiguous(rng: random.Random, symbols: int) -> Row:
    """The same over three to six symbols: what follows hangs on two or three symbols."""
    few = rng.sample(TOKENS[:symbols], rng.randint(3, 6))
    part = rng.choices(few, k=rng.randint(6, 14))
    return part * 2, [False] * (len(part) + 2) + [True] * (len(part) - 2)


def records(rng: random.Random, symbols: int, digits: int) -> Row:
    """Two to six lines "key value", then each asked once, in another order."""
    keys = rng.sample(TOKENS[10 : max(symbols, 34)], rng.randint(2, 6))
    values = [rng.choices(DIGITS, k=rng.randint(1, digits)) for _ in keys]
    row = [START, *USER]
    for key, value in zip(keys, values, strict=True):
        row += [key] * rng.choice((1, 1, 2)) + [BLANK] * rng.choice((0, 0, 1, 3)) + value
        row += [LINE] * rng.choice((1, 1, 0))
    learned = [False] * len(row)
    for key, value in rng.sample(list(zip(keys, values, strict=True)), len(keys)):
        row += [key, END, LINE, START, *ASSISTANT, key, *value, END, LINE, START, *USER]
        learned += [False] * 5 + [True] * (len(value) + 2) + [False] * 3
    return row, learned


class Exercises:
    """Phase A: repetition until it is mastered, then a wider vocabulary, ambiguity and records."""

    def __init__(self, rng: random.Random):
        self.rng, self.right, self.since = rng, 0.0, None

    def __call__(self, step: int) -> list[Row]:
        if self.since is None:
            if self.right < 0.93:
                return [repeat(self.rng, 20) for _ in range(32)]
            self.since = step
        age = step - self.since
        symbols = min(len(TOKENS), 20 + age // 5)
        share = min(0.56, 0.56 * age / 150)
        rows = []
        for _ in range(32):
            if self.rng.random() < share:
                rows.append(records(self.rng, symbols, min(3, 1 + age // 80)))
            else:
                rows.append(self.rng.choice((repeat, ambiguous))(self.rng, symbols))
        return rows


# ------------------------------------------------------------------------------ phase B


def twin(rng: random.Random, page: Page) -> list[int]:
    """A page as tokens: its plain lines, or loose ones with gaps, repeated words, empty lines."""
    if rng.random() < 1 / 3:
        return list(ids("\n".join(page.lines())))
    if page.kind == "scene":
        cells = [
            list(ids(f"{thing} ")) if (thing := dict(page.facts).get(place)) else [BLANK]
            for place in pages.PLACES
        ]
        return [t for i, cell in enumerate(cells) for t in cell + [LINE] * (i % 3 == 2)]
    row, line = [], -1
    for item in page.items:
        if item.row != line:
            empty = [LINE, *[BLANK] * rng.randint(0, 4)] * rng.choice((0, 0, 1))
            row += [LINE] * (line >= 0) + empty
            line = item.row
        row += [BLANK] * rng.choice((0, 0, 1, 2, 4))
        for part in item.text.split():
            row += ids(part) if part.isdigit() else ids(f"{part} ") * rng.choice((1, 1, 2, 3))
    return [*row, LINE]


def conversations(rng: random.Random) -> Row:
    """A page's text twin with what can be said about it, or facts, or records."""
    dice = rng.random()
    if dice < 0.1:
        return records(rng, len(TOKENS), 3)
    if dice < 0.2:
        return chat(world.facts_told(rng, rng.randint(3, 6)))
    page = layout(rng, rng.choice(MIX), "train")
    return chat(talk(rng, page), twin(rng, page))


def talk(rng: random.Random, page: Page) -> list[tuple[str, str]]:
    """Mixed questions about a page, or all that it says."""
    if rng.random() < 0.2:
        return [(question, answer) for _, question, answer, _ in world.accounts(rng, page)[:1]]
    turns = world.turns_about(rng, page)
    if rng.random() < 0.2:
        turns.append((world.ask(rng, "brief"), world.short_caption(rng, page)))
    return turns


# ------------------------------------------------------------------------------ phase C


def raster(
    rng: random.Random,
    page: Page,
    zoom: tuple[float, float],
    grid: tuple[int, int],
    move: tuple[float, float],
    end: int | None,
) -> list[int]:
    """One token per 8x8 patch of a zoomed page; `end` behind each of the grid's rows.

    A patch shows the word that covers it, one or two digits, the colour or the shape of an
    object, or nothing; small print is often misread, as the encoder will.
    """
    cells = [[BLANK] * grid[0] for _ in range(grid[1])]
    for item in page.items:
        a, b, c, d = (edge * zoom[i % 2] - move[i % 2] for i, edge in enumerate(item.box))
        if item.drawn:
            for (x, y), token in printed(rng, item, zoom[0], move[0], (b + d) / 2):
                if 0 <= x < grid[0] and 0 <= y < grid[1]:
                    cells[y][x] = token
            continue
        for y in range(grid[1]):
            for x in range(grid[0]):
                if a - 1 < 8 * x + 4 < c + 1 and b - 1 < 8 * y + 4 < d + 1:
                    cells[y][x] = ids(f"{item.text} ")[(x + y + item.row) % 2]
    return [token for row in cells for token in ([*row, end] if end is not None else row)]


def printed(
    rng: random.Random, item: pages.Item, zoom: float, move: float, y: float
) -> Iterator[tuple[tuple[int, int], int]]:
    """Where the glyphs of a word fall, patch by patch, and the token that stands for them."""
    patches: dict[int, str] = {}
    for char, left, right in zip(item.text, item.edges, item.edges[1:], strict=False):
        x = int(((left + right) / 2 * zoom - move) // 8)
        patches[x] = patches.get(x, "") + char
    misread = 0.015 if zoom > 0.6 else 0.2 if zoom > 0.4 else 0.8
    for x, chars in patches.items():
        token = PAIR.get(chars[:2]) or (ids(chars) if chars.isdigit() else ids(f"{item.text} "))[0]
        if not item.text.isdigit() and rng.random() < 0.08:
            token = ids(chars)[0]
        if rng.random() < misread:
            token = rng.choice((DOT, BLANK, rng.choice(DIGITS), rng.choice(KEYS)))
        yield (x, int(y // 8)), token


# The grids that AnyRes may choose, oftener the legible ones; 0 x 0 is the base view alone.
GRIDS = {
    "doc": ((3, 3), (3, 3), (2, 2), (4, 4)),
    "zh": ((3, 3),),
    "dense": ((3, 3), (3, 3), (4, 4)),
    "chart": ((2, 2), (2, 2), (2, 2), (2, 2), (0, 0)),
    "info": ((2, 3), (2, 4), (2, 3), (1, 2)),
    "scene": ((2, 2), (2, 2), (2, 2), (2, 2), (0, 0)),
}
TASKS = {kind: kind for kind in GRIDS} | {"transcribe": "doc"}
TASKS |= dict.fromkeys(("eats", "choice", "presence", "caption"), "scene")
BASE = (0, 0)  # no tiles


def shown(rng: random.Random, page: Page, grid: tuple[int, int]) -> list[int]:
    """The base view, then the tiles of a grid (none for 0 x 0), as tokens."""
    (w, h), (a, b) = page.size, grid
    base = raster(rng, page, (48 / w, 48 / h), (6, 6), (0, 0), None)
    if not a:
        return base
    scale = min(48 * a / w, 48 * b / h)
    move = ((w * scale - 48 * a) / 2, (h * scale - 48 * b) / 2)
    return base + raster(rng, page, (scale, scale), (6 * a, 6 * b), move, LINE)


def rasters(rng: random.Random) -> Row:
    """A crop with its transcription, a page with a caption, or a conversation about rasters."""
    dice, page = rng.random(), layout(rng, rng.choice(MIX), "train")
    if dice < 0.3:
        x, y, end, _ = window = pages.crop(rng, page)
        zoom = 48 / (end - x)
        seen = raster(rng, page, (zoom, zoom), (6, 6), (x * zoom, y * zoom), None)
        return plain(seen, "\n".join(pages.visible(page, window)))
    if dice < 0.35:
        return plain(shown(rng, page, BASE), world.short_caption(rng, page))
    if dice < 0.41:
        return conversations(rng)
    if dice < 0.44:
        frames, thing, way = pages.frames(rng, "train")
        seen = [t for frame in frames for t in (*shown(rng, frame, BASE), LINE)]
        return chat(world.turns_moving(rng, thing, way), seen[:-1])
    return chat(talk(rng, page), shown(rng, page, rng.choice(GRIDS[page.kind])))


def presences(rng: random.Random, rastered: bool) -> Row:
    """One to eight times about a scene, from its twin or its raster: is there such a thing?"""
    page = layout(rng, "scene", "train")
    drawn = [world.draw_presence(rng, page) for _ in range(rng.choice((1, 2, 4, 8)))]
    turns = [(world.ask(rng, "presence", world.a_(thing)), answer) for thing, answer in drawn]
    return chat(turns, shown(rng, page, (2, 2)) if rastered else twin(rng, page))


# ------------------------------------------------------------------------------ training


def learn(model: Qwen2ForCausalLM, rows: list[Row]) -> tuple[Tensor, dict]:
    """Mean loss over the learned tokens of some rows, packed into one, and how many were right."""
    lengths = [len(row) for row, _ in rows]
    tokens = torch.tensor([token for row, _ in rows for token in row])
    learned = torch.tensor([mark for _, marks in rows for mark in marks]).nonzero()[:, 0]
    positions = torch.cat([torch.arange(n) for n in lengths])
    hidden = model.model(
        input_ids=tokens[None], position_ids=positions[None], documents=lengths, use_cache=False,
        attention_mask=torch.ones(1, 1, 1, 1),
    ).last_hidden_state[0]  # fmt: skip
    logits, target = model.lm_head(hidden[learned - 1]).float(), tokens[learned]
    right = (logits.argmax(-1) == target).float().mean().item()
    return F.cross_entropy(logits, target), {"right": right, "tokens": float(len(tokens))}


def train(size: str, folder: Path, seed: int = 0) -> tuple[Qwen2ForCausalLM, dict]:
    """All phases; returns the model and its records."""
    torch.manual_seed(seed)
    model, times = build(size), SIZES[size][-1]
    a, b, c, d = (random.Random(f"reading {seed} {phase}") for phase in "ABCD")
    exercises = Exercises(a)

    def exercise(step: int) -> tuple[Tensor, dict]:
        loss, figures = learn(model, exercises(step))
        exercises.right += 0.1 * (figures["right"] - exercises.right)
        return loss, figures

    def twins(step: int) -> tuple[Tensor, dict]:
        make = partial(conversations, b) if step % 4 else partial(presences, b, False)
        return learn(model, [make() for _ in range(32)])

    def views(step: int) -> tuple[Tensor, dict]:
        make, n = (partial(rasters, c), 16) if step % 4 else (partial(presences, d, True), 32)
        return learn(model, [make() for _ in range(n)])

    losses = {"A": exercise, "B": twins, "C": views}
    return model, {
        phase: fit(f"llm_{size}_{phase}", model, losses[phase], times * steps, lr, folder, final)
        for phase, (steps, lr, final) in PHASES.items()
    }


@torch.no_grad()
def ceilings(model: Qwen2ForCausalLM, n: int = 200) -> dict:
    """How well a task's test questions are answered from a page's text, and from its raster.

    The share of exact answers; for whole texts the share of right tokens. A greedy answer is
    exact when each of its tokens is the likeliest after the right ones, so one forward a question
    tells. No VLM with this LLM can be expected to do better. Rasters are in the first of GRIDS,
    with the usual share of misread patches.
    """
    found = {}
    for task, kind in TASKS.items():
        sums = {"text": 0.0, "raster": 0.0}
        for i in range(n):
            rng = random.Random(f"ceiling {task} {i}")
            page = layout(rng, kind, "test")
            asked = [*world.questions(None, page, rng), *world.accounts(None, page)]
            _, question, answer, _ = rng.choice([q for q in asked if q[0] == task])
            text, tiles = ids("\n".join(page.lines())), shown(rng, page, GRIDS[kind][0])
            for view, seen in (("text", text), ("raster", tiles)):
                right = learn(model, [chat([(question, answer)], [*seen])])[1]["right"]
                sums[view] += right if task in ("transcribe", "caption") else right == 1
        found[task] = {view: round(total / n, 3) for view, total in sums.items()}
    return found
