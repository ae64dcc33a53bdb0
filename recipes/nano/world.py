"""The nano world's sources: pages with captions, transcriptions, questions; nano-1.

In a recipe, `path: ./nano/world.py:NAME` calls NAME(split, count, seed) -> records. To train on:
short_captions, transcriptions (crops that read in one 48-pixel view), detailed, instructions,
text_only. To score, one question per record: doc, dense, chart, info, presence, choice,
transcribe, caption.

A training answer restates its key ("tax 305"); an evaluation record also has `answer`, the value
alone ("305"): score the LAST WORD of a prediction against it. For `transcribe` the answer is the
whole text, for `caption` the facts, one per line, to be looked for among a prediction's lines.
Splits (train, val, test, tuning) share no fact "key value" and no scene; see pages.py.
"""

import io
import random
from collections.abc import Callable, Iterator

import pages
from pages import OBJECTS, Page
from PIL import Image
from PIL.PngImagePlugin import PngInfo

VERSION = "nano-1"
# fmt: off
FOODS = ["plum", "corn", "fish", "rice", "nuts", "leaf", "bread", "egg", "apple", "bean", "milk",
         "cake"]
# fmt: on
# 48 facts that no picture shows: an LLM must know them. Not a rule of colour and shape.
EATS = {thing: random.Random(f"eats {thing}").choice(FOODS) for thing in OBJECTS}
# fmt: off
NAMES = {"doc": "a page", "dense": "a full page", "chart": "a chart", "info": "a list",
         "scene": "a scene"}
# How often each kind is drawn for training.
MIX = ("doc", "doc", "dense", "chart", "info", "info", "scene", "scene", "scene")
# Wordings by form; evaluation uses the first.
ASK = {
    "doc": ("What is the {}?", "what is the {}?", "How much is the {}?", "Read the {}.",
            "What does it say for {}?", "{}?", "which {}?", "How much {}?", "the {} number"),
    "chart": ("What is the value of {}?", "what is the value of {}?", "How much is {}?",
              "What is the {}?", "{}?", "Which value does {} have?"),
    "info": ("What is the number of the {}?", "what is the number of the {}?",
             "Which number does the {} have?", "How much is the {}?", "{}?", "the {} number"),
    "scene": ("What is at the {}?", "what is at the {}?", "Which thing is at the {}?", "{}?"),
    "eats": ("What does the {} thing eat?", "what does the {} thing eat?",
             "What is the food of the {} thing?"),
    "presence": ("Is there {}?", "is there {}?", "Do you see {}?", "Is there {} in the image?"),
    "knows": ("What does {} eat?", "what does {} eat?", "What is the food of {}?"),
    "choice": ("What does the {} thing eat?\n{}\nAnswer with the letter.",),
    "transcribe": ("Read the text.", "Transcribe the image.", "What does the image say?"),
    "detail": ("Describe the image in detail.", "describe the image in detail."),
    "brief": ("Describe the image briefly.", "describe the image briefly."),
}
ASK["dense"] = ASK["doc"]
# fmt: on
Question = tuple[str, str, str, str]  # form, question, answer that restates the key, value alone


def ask(rng: random.Random | None, form: str, *parts: str) -> str:
    """A question of a form; without a generator its first wording, which evaluation uses."""
    if not rng:
        return ASK[form][0].format(*parts)
    subject = pages.cased(rng, parts[0]) if parts and rng.random() < 0.2 else "".join(parts[:1])
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
    text = " ".join(f"{letter} {food}" for letter, food in zip("ABCD", options, strict=True))
    return text, "ABCD"[options.index(EATS[thing])]


def short_caption(rng: random.Random, page: Page) -> str:
    """One or two true things."""
    facts = rng.sample(page.facts, min(len(page.facts), rng.randint(1, 2)))
    told = [a_(b) if page.kind == "scene" else f"{a} {b}" for a, b in facts]
    return f"{NAMES[page.kind]} with " + " and ".join(told)


def detailed_caption(page: Page) -> str:
    """Everything, one fact or printed line per line."""
    return "\n".join([NAMES[page.kind], *page.lines()])


def questions(rng: random.Random | None, page: Page, pick: random.Random) -> list[Question]:
    """All that can be asked about a page; `rng` draws the wording, `pick` what is asked."""
    found = [(page.kind, ask(rng, page.kind, a), f"{a} {b}", b) for a, b in page.facts]
    text = "\n".join(page.lines())
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
        found.append(("transcribe", ask(rng, "transcribe"), text, text))
    found.append(("caption", ask(rng, "detail"), detailed_caption(page), text))
    return found


def turns_about(rng: random.Random, page: Page) -> list[tuple[str, str]]:
    """Four to eight of a page's questions with answers."""
    asked = questions(rng, page, rng)
    chosen = rng.sample(asked, min(len(asked), rng.randint(4, 8)))
    return [(question, answer) for _, question, answer, _ in chosen]


def facts_told(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Questions and answers about what n things eat."""
    things = rng.sample(OBJECTS, n)
    return [(ask(rng, "knows", a_(thing)), f"{thing} eats {EATS[thing]}") for thing in things]


# ------------------------------------------------------------------------------ sources


def _record(
    name: str, page: Page | None, turns: list[tuple[str, str]], window: tuple | None = None, **more
) -> dict:
    """One record of a source; its picture, or a window of it, stands in the first question.

    The PNG carries the size of the page's type as `glyph_px`, for `chat` to tell.
    """
    talk, image = [], None
    for question, answer in turns:
        talk += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if page is not None:
        talk[0]["value"] = "<image>\n" + talk[0]["value"]
        x0, y0, x1, y1 = window or (0, 0, *page.size)
        note = PngInfo()
        note.add_text("glyph_px", str(page.glyph_px))
        picture = Image.fromarray(pages.render(page)[y0:y1, x0:x1])
        picture.save(file := io.BytesIO(), "PNG", compress_level=1, pnginfo=note)
        image = file.getvalue()
    source = "nano/" + name.split("/")[1]
    return {"id": name, "image": image, "conversations": talk, "source": source, **more}


def _drawn(source: str, split: str, count: int, seed: int) -> Iterator[tuple[str, random.Random]]:
    """Ids, each with its own generator: the same for the same arguments."""
    for i in range(count):
        name = f"{VERSION}/{source}/{split}/{seed}/{i}"
        yield name, random.Random(name)


def short_captions(split: str, count: int, seed: int) -> Iterator[dict]:
    """Whole pages with one or two true things about them (the blog's raw web captions)."""
    for name, rng in _drawn("short_captions", split, count, seed):
        page = pages.layout(rng, rng.choice(MIX), split)
        turn = (ask(rng, "brief"), short_caption(rng, page))
        yield _record(name, page, [turn])


def transcriptions(split: str, count: int, seed: int) -> Iterator[dict]:
    """Small crops with what can be read in them, for stage 1's single squashed view."""
    for name, rng in _drawn("transcriptions", split, count, seed):
        page = pages.layout(rng, rng.choice(MIX), split)
        window = pages.crop(rng, page)
        turn = (ask(rng, "transcribe"), "\n".join(pages.visible(page, window)))
        yield _record(name, page, [turn], window)


def detailed(split: str, count: int, seed: int) -> Iterator[dict]:
    """Whole pages with everything that they say: detailed captions and transcriptions."""
    for name, rng in _drawn("detailed", split, count, seed):
        page = pages.layout(rng, rng.choice(MIX), split)
        turn = (ask(rng, "detail"), detailed_caption(page))
        if page.kind != "scene" and rng.random() < 0.5:
            turn = (ask(rng, "transcribe"), "\n".join(page.lines()))
        yield _record(name, page, [turn])


def instructions(split: str, count: int, seed: int) -> Iterator[dict]:
    """Four to eight questions of all kinds about one page."""
    for name, rng in _drawn("instructions", split, count, seed):
        page = pages.layout(rng, rng.choice(MIX), split)
        turns = turns_about(rng, page)
        yield _record(name, page, turns)


def text_only(split: str, count: int, seed: int) -> Iterator[dict]:
    """Three to six facts without a picture; the facts are the same in every split."""
    for name, rng in _drawn("text_only", split, count, seed):
        yield _record(name, None, facts_told(rng, rng.randint(3, 6)))


def _task(form: str, kind: str) -> Callable[[str, int, int], Iterator[dict]]:
    """An evaluation source: one question of one form per page."""

    def task(split: str, count: int, seed: int) -> Iterator[dict]:
        for name, rng in _drawn(form, split, count, seed):
            page = pages.layout(rng, rng.choice((kind,)), split)
            asked = [q for q in questions(None, page, rng) if q[0] == form]
            _, question, restated, value = rng.choice(asked)
            yield _record(name, page, [(question, restated)], answer=value)

    return task


doc, dense, chart, info = (_task(kind, kind) for kind in ("doc", "dense", "chart", "info"))
presence, choice, caption = (_task(form, "scene") for form in ("presence", "choice", "caption"))
transcribe = _task("transcribe", "doc")
