"""Talk to a model and watch what it sees.

    python demo/app.py                                  # the nano model in demo/nano
    python demo/app.py --model runs/nano --model runs/flat

One process serves several visitors, each with a conversation of their own. What a visitor uploads
is read once, and forgotten with the conversation or an hour after the visit.
"""

import atexit
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Annotated

import gradio as gr
import psutil
import typer
from PIL import Image
from views import Exchange, picture, sees, speed, talk

from nanollava.anyres import Layout, open_image, parse_budget, parse_grids
from nanollava.extras.video import open_video
from nanollava.generate import Assistant, load
from nanollava.recipe import with_visual
from nanollava.sources import import_file

ROOT = Path(__file__).parents[1]
PIXELS, MEGABYTES, IMAGES, FRAMES = 40_000_000, 20, 8, 4
LETTERS, QUESTIONS, SECONDS, TOKENS = 500, 20, 60, 128
ANSWERS = 4  # at once; further ones wait in line
WARM = 8  # conversations that keep their keys and values
VIDEOS = (".mp4", ".mov", ".webm", ".avi", ".mkv", ".gif")
KINDS = {
    "document": "doc",
    "full document": "dense",
    "chart": "chart",
    "list": "info",
    "scene": "scene",
    "second script": "zh",
}
MADE_BY_HAND = ROOT / "recipes/nano/handmade"
EXAMPLES = {
    "invoice.png": "What is the tax?",
    "chart.png": "What is the value of fund?",
    "table.png": "Read the text.",
    "scene.png": "What is at the middle right?",
}
MODELS: dict[str, Assistant] = {}
HELD: Counter[str] = Counter()  # visits by uploaded file: equal files share a path
LATEST: list["Visit"] = []  # those that asked last


@dataclass(eq=False)
class Visit:
    """One visitor's images and conversation."""

    images: list[Image.Image] = field(default_factory=list)
    files: tuple[str, ...] = ()  # where the images came from, to read them once
    held: set[str] = field(default_factory=set)  # those, and what was refused
    exchanges: list[Exchange] = field(default_factory=list)
    answering: dict[tuple[str, int], Assistant] = field(default_factory=dict)

    def assistant(self, name: str, place: int) -> Assistant:
        """This visitor's own keys and values, for the first or the second setting of a model.

        A visitor who comes back after WARM others computes them anew.
        """
        LATEST[:] = [*(v for v in LATEST if v is not self), self]
        while len(LATEST) > WARM:
            LATEST.pop(0).answering = {}
        if (name, place) not in self.answering:
            self.answering[name, place] = Assistant(MODELS[name].model)
        return self.answering[name, place]

    def take(self, files: list[str]) -> bool:
        """Read the images and videos in the box, if they changed: a conversation about them begins.

        Raises ValueError for what cannot be read or is too much; it goes with the next beginning.
        """
        asked = self.exchanges or not self.files  # then the box is empty, and its images stay
        if tuple(files) == self.files or not files and asked:
            return False
        new = set(files) - self.held
        HELD.update(new)
        self.held |= new
        if len(files) > IMAGES:
            raise ValueError(f"{len(files)} files; give at most {IMAGES} at once")
        images = [image for file in files for image in open_file(file)]
        pixels = sum(image.width * image.height for image in images)
        if pixels > PIXELS:
            raise ValueError(f"{pixels:,} pixels together; the limit is {PIXELS:,}")
        self.begin(images, files)
        return True

    def readable(self, message: dict) -> dict:
        """What stands in the box, without the files that were refused."""
        return {**message, "files": [x for x in message.get("files") or [] if x in self.files]}

    def begin(self, images: list[Image.Image], files: Sequence[str] = ()) -> None:
        """Forget the last conversation, and its files on disk; start one about these images."""
        release(self.held - {*files})
        self.held &= {*files}
        self.images, self.files, self.exchanges, self.answering = images, tuple(files), [], {}


@cache
def made_by_hand() -> list[bytes]:
    """The files of the page's own examples."""
    return [(MADE_BY_HAND / name).read_bytes() for name in EXAMPLES]


def release(files: Collection[str]) -> None:
    """Delete uploads that no visit holds any more; the page's own examples stay."""
    HELD.subtract(files)
    for file in [file for file in files if HELD[file] <= 0]:
        del HELD[file]
        path = Path(file)
        if path.is_file() and path.read_bytes() not in made_by_hand():
            path.unlink()


def open_file(file: str) -> list[Image.Image]:
    """An image, or the frames of a video; ValueError says what was wrong with which file."""
    path = Path(file)
    try:
        if path.stat().st_size > MEGABYTES * 1_000_000:
            raise ValueError(f"{path.stat().st_size:,} bytes; the limit is {MEGABYTES} MB")
        data, video = path.read_bytes(), path.suffix.lower() in VIDEOS
        images = open_video(data, FRAMES, PIXELS) if video else [open_image(data, PIXELS)]
    except OSError as error:
        raise ValueError(f"{path.name}: it is gone; add it again") from error
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    for image in images:
        image.info.pop("glyph_px", None)  # only a page that is drawn here knows its type
    return images


def settings(grid: int, tokens: int, pooling: str) -> dict[str, str]:
    """The sliders as visual keys of a recipe."""
    return {
        "max_grid": f"{grid}x{grid}" if grid else "base",
        "max_visual_tokens": f"{tokens}T",
        "pooling": pooling,
    }


def named(name: str, grid: int, tokens: int, pooling: str) -> str:
    """The same in words, with the model where there are several."""
    model = f"{name}: " if len(MODELS) > 1 else ""
    size = f"up to {grid} x {grid}" if grid else "base view only"
    return f"{model}{size}, at most {tokens} T, {pooling}"


def layouts(visit: Visit, name: str, *setting) -> tuple[Layout, ...]:
    """How the visitor's images are laid out at a setting; ValueError for an impossible one."""
    model = MODELS[name].model
    visual = with_visual(model.recipe, settings(*setting)).visual
    return model.writer(visual).layouts(visit.images)


def shown(visit: Visit, name: str, *setting) -> str:
    """What the model would see of the visitor's images now; an impossible setting says why."""
    try:
        return sees(visit.images, layouts(visit, name, *setting), MODELS[name].model.spec.side ** 2)
    except ValueError as error:
        return talk([], error=str(error))


def added(visit: Visit, message: dict, *keys) -> tuple:
    """Files were dropped or taken out: show those that are there; a conversation begins."""
    try:
        if not visit.take(message["files"]):
            return visit, *[gr.skip()] * 5
    except ValueError as error:
        told = talk(visit.exchanges, len(visit.images), str(error))
        return visit, told, gr.skip(), visit.readable(message), gr.skip(), gr.skip()
    return visit, talk([], len(visit.images)), shown(visit, *keys), gr.skip(), "", ""


def checked(visit: Visit, message: dict, name: str, pairs: list, pooling: str, again: bool) -> str:
    """The question, if it can be asked about the images at all settings; else ValueError."""
    visit.take(message.get("files") or [])
    question = str(message.get("text") or "").strip()
    if not question:
        raise ValueError("Type a question.")
    if len(question) > LETTERS:
        raise ValueError(f"{len(question)} characters; a question has at most {LETTERS}.")
    if len(visit.exchanges) - again >= QUESTIONS:
        raise ValueError(f"{QUESTIONS} questions were asked: press Clear to begin anew.")
    for pair in pairs:
        layouts(visit, name, *pair, pooling)
    return question


def ask(
    visit: Visit,
    message: dict,
    name: str,
    grid: int,
    tokens: int,
    pooling: str,
    twice: bool,
    grid2: int,
    tokens2: int,
    again: bool = False,
) -> Iterator[tuple]:
    """Stream the answer to a question; at two settings, one after the other.

    Yields the conversation, what stands in the box, the speed, and the picture of why.
    """
    pairs = [(grid, tokens), (grid2, tokens2)][: 1 + twice]
    try:
        question = checked(visit, message, name, pairs, pooling, again)
    except ValueError as error:
        told = talk(visit.exchanges, len(visit.images), str(error))
        yield told, gr.skip() if again else visit.readable(message), gr.skip(), gr.skip()
        return
    before = visit.exchanges[: len(visit.exchanges) - again]
    exchange = Exchange(question, [named(name, *pair, pooling) for pair in pairs])
    visit.exchanges = talked = [*before, exchange]
    yield talk(talked), gr.skip() if again else None, gr.skip(), ""
    for place, pair in enumerate(pairs):
        assistant = visit.assistant(name, place)
        try:
            for _ in written(visit, exchange, before, assistant, settings(*pair, pooling)):
                if visit.exchanges is not talked:  # another image came, or Clear
                    return
                yield talk(talked), gr.skip(), gr.skip(), gr.skip()
        except ValueError as error:  # of a conversation that has grown too long
            visit.exchanges, told = before, f"{error}. Press Clear to begin anew."
            box = gr.skip() if again else visit.readable(message)
            yield talk(before, len(visit.images), told), box, gr.skip(), gr.skip()
            return
    exchange.running = False
    yield talk(talked), gr.skip(), measured(assistant), gr.skip()


def written(
    visit: Visit, exchange: Exchange, before: list[Exchange], assistant: Assistant, keys: dict
) -> Iterator[None]:
    """Add an answer to an exchange piece by piece, for SECONDS at most."""
    place = len(exchange.answers)
    # Only what was answered at this setting, or the model would read its own earlier answers.
    said = [
        (e.question, answer)
        for e in before
        for setting, answer in zip(e.settings, e.answers, strict=False)
        if setting == exchange.settings[place] and answer
    ]
    exchange.answers.append("")
    begin = time.monotonic()
    for piece in assistant.chat(
        visit.images, exchange.question, said, max_new_tokens=TOKENS, stream=True, **keys
    ):
        exchange.answers[place] += piece
        yield
        if time.monotonic() - begin > SECONDS:
            exchange.note = f"Stopped after {SECONDS} seconds."
            return


def measured(assistant: Assistant) -> str:
    """Time and memory of an assistant's last answer."""
    buffers = assistant.chat_cache.cache.buffers
    held = sum(x.nbytes for layer in buffers.values() for x in layer)
    return speed(assistant.seen, held, psutil.Process().memory_info().rss)


def again(visit: Visit, message: dict, *keys) -> Iterator[tuple]:
    """Ask the last question once more, at the settings of now."""
    if visit.exchanges:
        yield from ask(visit, {"text": visit.exchanges[-1].question}, *keys, again=True)
    else:
        told = talk([], len(visit.images), "There is no question to repeat.")
        yield told, gr.skip(), gr.skip(), gr.skip()


def lasting(stream: Callable[..., Iterator[tuple]]) -> Callable[..., Iterator[tuple]]:
    """The same with the visit in front: it lives for an hour after it was last an output."""

    def streamed(visit: Visit, *keys) -> Iterator[tuple]:
        for out in stream(visit, *keys):
            yield visit, *out

    return streamed


def stopped(visit: Visit) -> str:
    """The conversation after a visitor stopped an answer."""
    for exchange in visit.exchanges[-1:]:
        if exchange.running:
            exchange.note, exchange.running = "Stopped.", False
    return talk(visit.exchanges, len(visit.images))


def why(visit: Visit, name: str) -> str:
    """Where the last answer looked."""
    if visit.exchanges and (name, 0) not in visit.answering:
        return talk([], error="Press Retry first: what this answer was made from is not kept.")
    try:
        image = visit.assistant(name, 0).why()
    except ValueError as error:
        return talk([], error=f"There is nothing to explain: {error}.")
    alt = "the base view and the tiles, orange where the answer looked"
    return f'<div class="why">{picture(image, alt)}</div>'


def new_page(visit: Visit, kind: str, *keys) -> tuple:
    """Draw a page that nobody has seen: its picture, its truth, a question about it."""
    pages, world = (import_file(f"{ROOT}/recipes/nano/{x}.py") for x in ("pages", "world"))
    rng = random.Random()
    page = pages.layout(rng, KINDS[kind], "test")
    visit.begin([open_image(world.png(page))])
    message = {"text": world.questions(None, page, rng)[0][1], "files": []}
    return visit, talk([], 1), shown(visit, *keys), message, "\n".join(page.lines()), ""


def clear(visit: Visit, *keys) -> tuple:
    """Forget the conversation and its images."""
    visit.begin([])
    return visit, talk([]), shown(visit, *keys), None, "", ""


def build() -> gr.Blocks:
    """The page."""
    first = next(iter(MODELS.values())).model
    visual, T = first.recipe.visual, first.spec.side**2
    most = max(max(pair) for pair in parse_grids(visual.max_grid))
    budget = parse_budget(visual.max_visual_tokens, T) // T
    kept = (600, 3600)  # every ten minutes, delete uploads that are an hour old
    with gr.Blocks(title="nanollava", delete_cache=kept, analytics_enabled=False) as page:
        visit = gr.State(
            Visit(), time_to_live=3600, delete_callback=partial(Visit.begin, images=[])
        )
        gr.Markdown(
            "# nanollava\nAsk about an image, and watch which tiles and how many visual tokens the "
            "answer is made from. The nano model reads nano pages; it is no general assistant."
        )
        with gr.Row():
            with gr.Column(scale=3, min_width=320):
                with gr.Row(elem_id="pages"):
                    kind = gr.Dropdown(list(KINDS), value="document", label="Kind of page")
                    draw = gr.Button("New page", variant="primary", min_width=120)
                conversation = gr.HTML(talk([]), elem_id="conversation")
                message = gr.MultimodalTextbox(
                    label="Question",
                    placeholder="Drop or paste images or a video, and ask",
                    file_count="multiple",
                    file_types=["image", "video"],
                    sources=["upload"],
                    autofocus=True,
                    elem_id="question",
                )
                with gr.Row():
                    stop, retry, forget, explain = (
                        gr.Button(name, min_width=80) for name in ("Stop", "Retry", "Clear", "Why?")
                    )
                looked = gr.HTML(elem_id="why")
                with gr.Accordion("What the page really says", open=False):
                    truth = gr.Textbox(show_label=False, lines=6, elem_id="truth", label="Truth")
            with gr.Column(scale=2, min_width=320):
                model = gr.Dropdown(list(MODELS), label="Model", visible=len(MODELS) > 1)
                grid, tokens = sliders(most, budget, "")
                pooling = gr.Radio(["bilinear", "average"], value=visual.pooling, label="Pooling")
                seen = gr.HTML(sees([], [], T), elem_id="sees")
                with gr.Accordion("Answer at a second setting too", open=False):
                    twice = gr.Checkbox(label="Two answers, side by side", elem_id="twice")
                    grid2, tokens2 = sliders(0, budget, " of the second answer")
                with gr.Accordion("Speed and memory", open=False):
                    figures = gr.HTML(speed(None, 0, 0), elem_id="speed")
        examples = [[{"text": q, "files": [str(MADE_BY_HAND / n)]}] for n, q in EXAMPLES.items()]
        gr.Examples(examples, message, label="Pages made by hand")

        keys, quiet = [model, grid, tokens, pooling], {"show_progress": "hidden"}
        out = [visit, conversation, message, figures, looked]
        view = [visit, conversation, seen, message, truth, looked]
        asked = [visit, message, *keys, twice, grid2, tokens2]
        limit = {"concurrency_limit": ANSWERS, "concurrency_id": "answers"}
        limit |= quiet
        events = [
            message.submit(lasting(ask), asked, out, api_name="ask", **limit),
            retry.click(lasting(again), asked, out, api_name="again", **limit),
        ]
        for event in events:
            event.then(shown, [visit, *keys], seen, **quiet)
        message.change(added, [visit, message, *keys], view, concurrency_limit=ANSWERS, **quiet)
        draw.click(new_page, [visit, kind, *keys], view, **quiet)
        forget.click(clear, [visit, *keys], view, cancels=events, **quiet)
        gr.on([key.change for key in keys], shown, [visit, *keys], seen, **quiet)
        explain.click(why, [visit, model], looked, **limit)
        stop.click(stopped, visit, conversation, cancels=events, queue=False)
        page.unload(leaving(page))
    return page


def leaving(page: gr.Blocks) -> Callable[[gr.Request], None]:
    """Forget what a visitor who goes had asked for: gradio before 6.26 keeps every request."""
    gone: set[str] = set()

    def left(request: gr.Request) -> None:
        gone.add(request.session_hash)
        events, waiting = page._queue.event_ids_to_events, page._queue.pending_event_ids_session
        for name, event in [*events.items()]:
            who = event.session_hash
            if who in gone and name not in waiting.get(who, ()):  # else with the next who leaves
                events.pop(name, None)
        gone.intersection_update(event.session_hash for event in [*events.values()])

    return left


def sliders(grid: int, tokens: int, whose: str) -> tuple[gr.Slider, gr.Slider]:
    """Two sliders: the largest grid, and tau in views."""
    title = f"Largest grid{whose}: n x n, 0 for the base view only"
    return (
        gr.Slider(0, 6, grid, step=1, label=title),
        gr.Slider(1, 37, tokens, step=1, label=f"Most visual tokens{whose}, in T"),
    )


def serve(folders: list[str], visits: int = 256, **keys) -> gr.Blocks:
    """Load models and open the page, which remembers the latest visits."""
    uploads = tempfile.mkdtemp(prefix="nanollava")  # of this process alone: gone when it ends
    os.environ["GRADIO_TEMP_DIR"] = uploads
    atexit.register(shutil.rmtree, uploads, ignore_errors=True)
    for folder in folders:
        name = Path(folder).name
        MODELS[folder if name in MODELS else name] = load(folder)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace"])
    page = build().queue(max_size=64)
    page.launch(
        css_paths=Path(__file__).with_name("style.css"),
        theme=theme,
        footer_links=[],
        state_session_capacity=visits,
        max_file_size=f"{MEGABYTES}mb",
        ssr_mode=False,
        **keys,
    )
    return page


def main(
    model: Annotated[list[str] | None, typer.Option(help="A run folder; several: a menu")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets others in")] = "127.0.0.1",
    port: int = 7860,
    share: Annotated[bool, typer.Option(help="a public link through gradio.live")] = False,
    visits: Annotated[int, typer.Option(help="how many conversations are remembered")] = 256,
) -> None:
    """Serve the demo until it is interrupted."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())  # so that the uploads go, too
    folders = model or [str(Path(__file__).with_name("nano"))]
    serve(folders, visits, server_name=host, server_port=port, share=share)


if __name__ == "__main__":
    typer.run(main)
