"""The nano world's sources: pages with captions, transcriptions, questions; nano-1.

In a recipe, `path: ./nano/world.py:NAME` calls NAME(split, count, seed) -> records. To train on:
short_captions, transcriptions (crops that read in one 48-pixel view), web_random and web_top (both
kinds of text, half of them another picture's or none), detailed, documents, chinese, instructions,
sheets, moving (four frames a record), text_only. To score, one question per record: doc, sheet,
dense, chart, info, zh, presence, choice, transcribe, caption, motion.

A training answer restates its key ("tax 305"); an evaluation record also has `answer`, the value
alone ("305"): score the LAST WORD of a prediction against it. For `transcribe` the answer is the
whole text, for `caption` the facts, one per line, to be looked for among a prediction's lines.
Splits (train, val, test, tuning, hard) share no fact "key value" and no scene; see pages.py. In
`hard`, a thing that is not there shares its colour or its shape with one that is.
"""

import io
import random
from collections.abc import Callable, Iterator, Sequence

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
NAMES = {"doc": "a page", "sheet": "a page", "dense": "a full page", "chart": "a chart",
         "info": "a list", "scene": "a scene", "zh": "一页"}
# How often each kind is drawn for training.
MIX = ("doc", "doc", "dense", "chart", "info", "info", "scene", "scene", "scene")
PAGES = ("doc", "doc", "dense", "chart", "info", "info")
# Wordings by form; evaluation uses the first.
ASK = {
    "doc": ("What is the {}?", "what is the {}?", "How much is the {}?", "Read the {}.",
            "What does it say for {}?", "{}?", "which {}?", "How much {}?", "the {} number",
            "What's the {}?", "Tell me the {}.", "Give me the {}.", "find the {}", "{} please",
            "Which {} is it?", "What {} is shown?", "What is the value of {}?", "I need the {}",
            "Can you read the {}?", "What number is next to {}?", "What is written behind {}?",
            "What is the {} on this page?", "How high is the {}?", "Which number has the {}?"),
    "chart": ("What is the value of {}?", "what is the value of {}?", "How much is {}?",
              "What is the {}?", "{}?", "Which value does {} have?", "What's the value of {}?",
              "How long is the bar of {}?", "Tell me the value of {}.", "How high is {}?"),
    "info": ("What is the number of the {}?", "what is the number of the {}?",
             "Which number does the {} have?", "How much is the {}?", "{}?", "the {} number",
             "What's next to the {}?", "Which number is beside the {}?", "Tell me the number "
             "of the {}.", "What does it say for the {}?", "read the number of the {}"),
    "scene": ("What is at the {}?", "what is at the {}?", "Which thing is at the {}?", "{}?",
              "What's at the {}?", "what do you see at the {}?", "Which object is in the {}?"),
    "eats": ("What does the {} thing eat?", "what does the {} thing eat?",
             "What is the food of the {} thing?"),
    "presence": ("Is there {}?", "is there {}?", "Do you see {}?", "Is there {} in the image?",
                 "Can you see {}?", "Does the picture show {}?"),
    "motion": ("Which way does the {} move?", "Where does the {} go?", "where is the {} moving?"),
    "moves": ("What moves?", "Which thing moves?", "what is moving, and where?"),
    "knows": ("What does {} eat?", "what does {} eat?", "What is the food of {}?"),
    "choice": ("What does the {} thing eat?\n{}\nAnswer with the letter.",),
    "transcribe": ("Read the text.", "Transcribe the image.", "What does the image say?",
                   "What is written here?", "read everything", "Read the page."),
    "detail": ("Describe the image in detail.", "describe the image in detail."),
    "brief": ("Describe the image briefly.", "describe the image briefly.", "What is this?"),
    "zh": ("{}是多少？", "{}多少？", "请问{}是多少？"),
    "zh detail": ("请读出文字。", "图上写了什么？"),
}
ASK["dense"] = ASK["sheet"] = ASK["doc"]
HELLO = ("Please: ", "Hello! ", "In this image, ", "Look at the picture. ", "Can you tell me: ")
# fmt: on
Question = tuple[str, str, str, str]  # form, question, answer that restates the key, value alone


def ask(rng: random.Random | None, form: str, *parts: str) -> str:
    """A question of a form; without a generator its first wording, which evaluation uses.

    One in ten begins with a greeting or with a word that nobody knows.
    """
    if not rng:
        return ASK[form][0].format(*parts)
    subject = pages.cased(rng, parts[0]) if parts and rng.random() < 0.2 else "".join(parts[:1])
    asked = rng.choice(ASK[form]).format(subject, *parts[1:])
    if rng.random() < 0.9 or not asked.isascii():
        return asked
    unknown = "".join(rng.choices("abcdefghiklmnoprstuvw", k=rng.randint(2, 7))) + " "
    return rng.choice((*HELLO, unknown)) + asked


def a_(thing: str) -> str:
    """The thing with its article."""
    return f"an {thing}" if thing[0] in "aeiou" else f"a {thing}"


def draw_presence(rng: random.Random, page: Page) -> tuple[str, str]:
    """An object and yes or no; a negative shares neither colour nor shape with the scene.

    On a hard page it shares one of them.
    """
    shown = [thing for _, thing in page.facts]
    if rng.random() < 0.5:
        return rng.choice(shown), "yes"
    parts = {part for thing in shown for part in thing.split()}
    common = [len(parts & set(o.split())) for o in OBJECTS]
    fits = [o for o, n in zip(OBJECTS, common, strict=True) if n == page.hard and o not in shown]
    return rng.choice(fits), "no"


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


def transcript(rng: random.Random | None, page: Page) -> tuple[str, str]:
    """The question for a page's whole text, and that text."""
    form = "zh detail" if page.kind == "zh" else "transcribe"
    return ask(rng, form), "\n".join(page.lines())


def questions(rng: random.Random | None, page: Page, pick: random.Random) -> list[Question]:
    """All that can be asked about a page; `rng` draws the wording, `pick` what is asked."""
    found = [(page.kind, ask(rng, page.kind, a), f"{a} {b}", b) for a, b in page.facts]
    if page.kind == "scene":
        for place, thing in page.facts:
            fact = f"{thing} eats {EATS[thing]}"
            found.append(("eats", ask(rng, "eats", place), fact, EATS[thing]))
            options, letter = draw_choice(pick, thing)
            found.append(("choice", ask(rng, "choice", place, options), f"{fact} {letter}", letter))
        for _ in page.facts:
            thing, answer = draw_presence(pick, page)
            found.append(("presence", ask(rng, "presence", a_(thing)), answer, answer))
    return found


def accounts(rng: random.Random | None, page: Page) -> list[Question]:
    """What a page's whole content answers: its transcription (no scene's), its caption."""
    text = "\n".join(page.lines())
    found = [("caption", ask(rng, "detail"), detailed_caption(page), text)]
    return found if page.kind == "scene" else [("transcribe", *transcript(rng, page), text), *found]


def turns_about(rng: random.Random, page: Page) -> list[tuple[str, str]]:
    """Four to eight of a page's questions with answers, at times with an account of it all.

    Seldom, because in a mean over tokens a long answer outweighs all the short ones.
    """
    asked = questions(rng, page, rng)
    chosen = rng.sample(asked, min(len(asked), rng.randint(4, 8)))
    if rng.random() < 0.3:
        chosen.append(rng.choice(accounts(rng, page)))
    return [(question, answer) for _, question, answer, _ in chosen]


def turns_moving(rng: random.Random, thing: str, way: str) -> list[tuple[str, str]]:
    """What moves, and which way."""
    asked = [ask(rng, "moves"), ask(rng, "motion", thing)]
    return [(question, f"{thing} moves {way}") for question in rng.sample(asked, 2)]


def facts_told(rng: random.Random, n: int) -> list[tuple[str, str]]:
    """Questions and answers about what n things eat."""
    things = rng.sample(OBJECTS, n)
    return [(ask(rng, "knows", a_(thing)), f"{thing} eats {EATS[thing]}") for thing in things]


# ------------------------------------------------------------------------------ sources


def png(page: Page, window: tuple[int, int, int, int] | None = None) -> bytes:
    """A page's picture, or a window of it; it carries the size of its type as `glyph_px`."""
    note = PngInfo()
    note.add_text("glyph_px", str(page.glyph_px))
    x0, y0, x1, y1 = window or (0, 0, *page.size)
    picture = Image.fromarray(pages.render(page)[y0:y1, x0:x1])
    picture.save(file := io.BytesIO(), "PNG", compress_level=1, pnginfo=note)
    return file.getvalue()


def _record(
    name: str, image: bytes | list[bytes] | None, turns: list[tuple[str, str]], **more
) -> dict:
    """One record of a source; its pictures stand in the first question."""
    talk = []
    for question, answer in turns:
        talk += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    count = len(image) if isinstance(image, list) else int(image is not None)
    talk[0]["value"] = "<image>\n" * count + talk[0]["value"]
    source = "nano/" + name.split("/")[1]
    return {"id": name, "image": image, "conversations": talk, "source": source, **more}


def _drawn(source: str, split: str, count: int, seed: int) -> Iterator[tuple[str, random.Random]]:
    """Ids, each with its own generator: the same for the same arguments."""
    for i in range(count):
        name = f"{VERSION}/{source}/{split}/{seed}/{i}"
        yield name, random.Random(name)


def _source(name: str, about: str, kinds: Sequence[str], turns: Callable) -> Callable:
    """A source of whole pages: `turns(rng, page)` tells what is said about each."""

    def source(split: str, count: int, seed: int) -> Iterator[dict]:
        for id_, rng in _drawn(name, split, count, seed):
            page = pages.layout(rng, rng.choice(kinds), split)
            yield _record(id_, png(page), turns(rng, page))

    source.__doc__ = about
    return source


short_captions = _source(
    "short_captions", "One or two true things about a page (the blog's raw web captions).",
    MIX, lambda rng, page: [(ask(rng, "brief"), short_caption(rng, page))],
)  # fmt: skip
detailed = _source(
    "detailed", "All that a page says or shows (the blog's re-captioned data).",
    MIX, lambda rng, page: [(ask(rng, "detail"), detailed_caption(page))],
)  # fmt: skip
documents = _source(
    "documents", "All that a printed page says (the blog's document data).",
    PAGES, lambda rng, page: [transcript(rng, page)],
)  # fmt: skip
chinese = _source(
    "chinese", "All that a page in the second script says (the blog's Chinese data).",
    ("zh",), lambda rng, page: [transcript(rng, page)],
)  # fmt: skip
instructions = _source(
    "instructions", "Four to eight questions of all kinds about one page.", MIX, turns_about
)


sheets = _source("sheets", "Four to eight questions about one large page.", ("sheet",), turns_about)


def transcriptions(split: str, count: int, seed: int) -> Iterator[dict]:
    """Small crops with what can be read in them, for stage 1's single squashed view."""
    for name, rng in _drawn("transcriptions", split, count, seed):
        page = pages.layout(rng, rng.choice(MIX), split)
        window = pages.crop(rng, page)
        turn = (ask(rng, "transcribe"), "\n".join(pages.visible(page, window)))
        yield _record(name, png(page, window), [turn])


def _web(name: str, wrong: float) -> Callable:
    """Pictures with texts as the web has them: half of the pictures are whole pages with a short
    caption, half are crops with what they say; a share of the texts is another picture's.
    """

    def source(split: str, count: int, seed: int) -> Iterator[dict]:
        for id_, rng in _drawn(name, split, count, seed):
            page = told = pages.layout(rng, rng.choice(MIX), split)
            if rng.random() < wrong:
                told = pages.layout(rng, rng.choice(MIX), split)
            if rng.random() < 0.5:
                turn = (ask(rng, "brief"), short_caption(rng, told))
                yield _record(id_, png(page), [turn])
            else:
                other, window = pages.crop(rng, told), pages.crop(rng, page)
                text = "\n".join(pages.visible(told, window if told is page else other))
                yield _record(id_, png(page, window), [(ask(rng, "transcribe"), text)])

    source.__doc__ = f"Web pictures and texts, {wrong:.0%} of the texts another picture's."
    return source


web_random, web_top = _web("web_random", 0.5), _web("web_top", 0.0)


def moving(split: str, count: int, seed: int) -> Iterator[dict]:
    """Four frames of a scene in which one thing moves: what, and which way?"""
    for name, rng in _drawn("moving", split, count, seed):
        frames, thing, way = pages.frames(rng, split)
        yield _record(name, [png(frame) for frame in frames], turns_moving(rng, thing, way))


def text_only(split: str, count: int, seed: int) -> Iterator[dict]:
    """Three to six facts without a picture; the facts are the same in every split."""
    for name, rng in _drawn("text_only", split, count, seed):
        yield _record(name, None, facts_told(rng, rng.randint(3, 6)))


def _task(form: str, kind: str) -> Callable[[str, int, int], Iterator[dict]]:
    """An evaluation source: one question of one form per page."""

    def task(split: str, count: int, seed: int) -> Iterator[dict]:
        for name, rng in _drawn(form, split, count, seed):
            page = pages.layout(rng, rng.choice((kind,)), split)
            asked = [*questions(None, page, rng), *accounts(None, page)]
            _, question, restated, value = rng.choice([q for q in asked if q[0] == form])
            yield _record(name, png(page), [(question, restated)], answer=value)

    return task


doc, sheet, dense, chart, info, zh = (
    _task(k, k) for k in ("doc", "sheet", "dense", "chart", "info", "zh")
)
presence, choice, caption = (_task(form, "scene") for form in ("presence", "choice", "caption"))
transcribe = _task("transcribe", "doc")


def motion(split: str, count: int, seed: int) -> Iterator[dict]:
    """An evaluation source: which way does the thing move in four frames?"""
    for name, rng in _drawn("motion", split, count, seed):
        frames, thing, way = pages.frames(rng, split)
        turn = (ask(None, "motion", thing), f"{thing} moves {way}")
        yield _record(name, [png(frame) for frame in frames], [turn], answer=way)
