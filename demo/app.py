"""Talk to a model and watch what it sees.

    python demo/app.py                                  # the nano model in demo/nano
    python demo/app.py --model runs/nano --model runs/flat

One process serves several visitors, each with a conversation of their own. What a visitor uploads
is read once, and forgotten with the conversation or an hour after the visit.
"""

import atexit
import os
import random
import resource
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated

import gradio as gr
import typer
from PIL import Image
from views import Exchange, picture, sees, speed, talk

from nanollava.anyres import open_image, open_video, parse_budget, parse_grids
from nanollava.generate import Assistant, load
from nanollava.recipe import with_visual
from nanollava.sources import import_file

ROOT = Path(__file__).parents[1]
PIXELS, MEGABYTES, IMAGES, FRAMES = 40_000_000, 20, 8, 4
LETTERS, QUESTIONS, SECONDS, TOKENS = 500, 20, 60, 128
ANSWERS = 4  # at once; further ones wait in line
VIDEOS = (".mp4", ".mov", ".webm", ".avi", ".mkv", ".gif")
KINDS = {"document": "doc", "full document": "dense", "chart": "chart", "list": "info",
         "scene": "scene", "second script": "zh"}  # fmt: skip
MADE_BY_HAND = ROOT / "recipes/nano/handmade"
EXAMPLES = {"invoice.png": "What is the tax?", "chart.png": "What is the value of fund?",
            "table.png": "Read the text.", "scene.png": "What is at the middle right?"}  # fmt: skip
MODELS: dict[str, Assistant] = {}


@dataclass
class Visit:
    """One visitor's images and conversation."""

    images: list[Image.Image] = field(default_factory=list)
    files: tuple[str, ...] = ()  # where the images came from, to read them once
    exchanges: list[Exchange] = field(default_factory=list)
    answering: dict[tuple[str, int], Assistant] = field(default_factory=dict)

    def assistant(self, name: str, place: int) -> Assistant:
        """This visitor's own keys and values, for the first or the second setting of a model."""
        if (name, place) not in self.answering:
            self.answering[name, place] = Assistant(MODELS[name].model)
        return self.answering[name, place]

    def take(self, files: list[str]) -> bool:
        """Read images and videos that were just added: a conversation about them begins.

        Raises ValueError for what cannot be read or is too much.
        """
        if not files or tuple(files) == self.files:
            return False
        if len(files) > IMAGES:
            raise ValueError(f"{len(files)} files; give at most {IMAGES} at once")
        self.begin([image for file in files for image in open_file(file)], files)
        return True

    def begin(self, images: list[Image.Image], files: Sequence[str] = ()) -> None:
        """Forget the last conversation, and its files on disk; start one about these images."""
        for file in {*self.files} - {*files}:
            if Path(file).name not in EXAMPLES:
                Path(file).unlink(missing_ok=True)
        self.images, self.files, self.exchanges, self.answering = images, tuple(files), [], {}


def open_file(file: str) -> list[Image.Image]:
    """An image, or the frames of a video; ValueError says what was wrong with which file."""
    path = Path(file)
    try:
        if path.stat().st_size > MEGABYTES * 1_000_000:
            raise ValueError(f"{path.stat().st_size:,} bytes; the limit is {MEGABYTES} MB")
        video = path.suffix.lower() in VIDEOS
        images = open_video(path, FRAMES) if video else [open_image(path)]
        for image in images:
            if image.width * image.height > PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels; the limit is {PIXELS:,}")
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error
    return images


def settings(grid: int, tokens: int, pooling: str) -> dict[str, str]:
    """The sliders as visual keys of a recipe."""
    return {
        "max_grid": f"{grid}x{grid}" if grid else "base",
        "max_visual_tokens": f"{tokens}T",
        "pooling": pooling,
    }


def named(grid: int, tokens: int, pooling: str) -> str:
    """The same in words."""
    return (
        f"{f'up to {grid} x {grid}' if grid else 'base view only'}, at most {tokens} T, {pooling}"
    )


def shown(visit: Visit, name: str, grid: int, tokens: int, pooling: str) -> str:
    """What the model would see of the visitor's images now; an impossible setting says why."""
    model = MODELS[name].model
    try:
        visual = with_visual(model.recipe, settings(grid, tokens, pooling)).visual
        layouts = model.writer(visual).layouts(visit.images)
    except ValueError as error:
        return talk([], error=str(error))
    return sees(visit.images, layouts, model.row.side**2)


def added(visit: Visit, message: dict, *keys) -> tuple:
    """Files were dropped: show them and begin a conversation about them."""
    try:
        if not visit.take(message["files"]):
            return gr.skip(), gr.skip(), gr.skip()
    except ValueError as error:
        return talk(visit.exchanges, len(visit.images), str(error)), gr.skip(), {"files": []}
    return talk([], len(visit.images)), shown(visit, *keys), gr.skip()


def ask(visit: Visit, message: dict, name: str, grid: int, tokens: int, pooling: str,
        twice: bool, grid2: int, tokens2: int) -> Iterator[tuple]:  # fmt: skip
    """Stream the answer to a question; at two settings, one after the other."""
    question = (message.get("text") or "").strip()
    keep = {"text": question, "files": []}
    try:
        visit.take(message.get("files") or [])
        if not question:
            raise ValueError("Type a question.")
        if len(question) > LETTERS:
            raise ValueError(f"{len(question)} characters; a question has at most {LETTERS}.")
        if len(visit.exchanges) >= QUESTIONS:
            raise ValueError(f"{QUESTIONS} questions were asked: press Clear to begin anew.")
    except ValueError as error:
        yield talk(visit.exchanges, len(visit.images), str(error)), keep, gr.skip()
        return
    pairs = [(grid, tokens), (grid2, tokens2)][: 1 + twice]
    exchange = Exchange(question, [named(*pair, pooling) for pair in pairs])
    for place, (pair, setting) in enumerate(zip(pairs, exchange.settings, strict=True)):
        # Only what was answered at this setting, or the model would read its own earlier answers.
        said = [(e.question, dict(zip(e.settings, e.answers, strict=False)).get(setting))
                for e in visit.exchanges if e is not exchange]  # fmt: skip
        assistant = visit.assistant(name, place)
        try:
            pieces = assistant.chat(
                visit.images, question, [(q, a) for q, a in said if a], max_new_tokens=TOKENS,
                stream=True, **settings(*pair, pooling),
            )  # fmt: skip
        except ValueError as error:
            visit.exchanges = [e for e in visit.exchanges if e is not exchange]
            yield talk(visit.exchanges, len(visit.images), str(error)), keep, gr.skip()
            return
        if not place:
            visit.exchanges.append(exchange)
        exchange.answers.append("")
        yield talk(visit.exchanges), None if not place else gr.skip(), gr.skip()
        begin = time.monotonic()
        for piece in pieces:
            exchange.answers[place] += piece
            if time.monotonic() - begin > SECONDS:
                exchange.note = f"Stopped after {SECONDS} seconds."
                break
            yield talk(visit.exchanges), gr.skip(), gr.skip()
    yield talk(visit.exchanges), gr.skip(), measured(assistant)


def measured(assistant: Assistant) -> str:
    """Time and memory of an assistant's last answer."""
    cache = assistant.memory.cache
    held = sum(x.nbytes for layer in cache.buffers.values() for x in layer) if cache else 0
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return speed(assistant.seen, held, most)


def again(visit: Visit, message: dict, *keys) -> Iterator[tuple]:
    """Ask the last question once more, at the settings of now."""
    if not visit.exchanges:
        yield talk([], len(visit.images), "There is no question to repeat."), message, gr.skip()
        return
    yield from ask(visit, {"text": visit.exchanges.pop().question}, *keys)


def stopped(visit: Visit) -> str:
    """The conversation after a visitor stopped an answer."""
    if visit.exchanges and not visit.exchanges[-1].note:
        visit.exchanges[-1].note = "Stopped."
    return talk(visit.exchanges, len(visit.images))


def why(visit: Visit, name: str) -> str:
    """Where the last answer looked."""
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
    question = world.questions(None, page, rng)[0][1]
    truth = "\n".join(page.lines())
    return talk([], 1), shown(visit, *keys), truth, {"text": question, "files": []}


def clear(visit: Visit, *keys) -> tuple:
    """Forget the conversation and its images."""
    visit.begin([])
    return talk([]), shown(visit, *keys), None, "", ""


def build() -> gr.Blocks:
    """The page."""
    first = next(iter(MODELS.values())).model
    visual, T = first.recipe.visual, first.row.side**2
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
                    label="Question", placeholder="Drop or paste images or a video, and ask",
                    file_count="multiple", file_types=["image", "video"], sources=["upload"],
                    autofocus=True, elem_id="question",
                )  # fmt: skip
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

        keys, out = [model, grid, tokens, pooling], [conversation, message, figures]
        asked, quiet = [visit, message, *keys, twice, grid2, tokens2], {"show_progress": "hidden"}
        limit = {"concurrency_limit": ANSWERS, "concurrency_id": "answers"}
        events = [message.submit(ask, asked, out, api_name="ask", **limit, **quiet),
                  retry.click(again, asked, out, api_name="again", **limit, **quiet)]  # fmt: skip
        for event in events:
            event.then(shown, [visit, *keys], seen, **quiet)
        message.change(added, [visit, message, *keys], [conversation, seen, message], **quiet)
        gr.on([key.change for key in keys], shown, [visit, *keys], seen, **quiet)
        draw.click(new_page, [visit, kind, *keys], [conversation, seen, truth, message], **quiet)
        explain.click(why, [visit, model], looked, **limit)
        stop.click(stopped, visit, conversation, cancels=events, queue=False)
        forget.click(clear, [visit, *keys], [conversation, seen, message, truth, looked],
                     cancels=events, **quiet)  # fmt: skip
    return page


def sliders(grid: int, tokens: int, whose: str) -> tuple[gr.Slider, gr.Slider]:
    """Two sliders: the largest grid, and tau in views."""
    title = f"Largest grid{whose}: n x n, 0 for the base view only"
    return (gr.Slider(0, 6, grid, step=1, label=title),
            gr.Slider(1, 37, tokens, step=1, label=f"Most visual tokens{whose}, in T"))  # fmt: skip


def serve(folders: list[str], **keys) -> gr.Blocks:
    """Load models and open the page."""
    os.environ["GRADIO_TEMP_DIR"] = tempfile.mkdtemp()  # of this process alone: gone when it ends
    atexit.register(shutil.rmtree, os.environ["GRADIO_TEMP_DIR"], ignore_errors=True)
    for folder in folders:
        MODELS[Path(folder).name] = load(folder)
    theme = gr.themes.Soft(font=["system-ui", "sans-serif"], font_mono=["ui-monospace"])
    page = build().queue(max_size=64)
    page.launch(
        css_paths=Path(__file__).with_name("style.css"), theme=theme, footer_links=[],
        max_file_size=f"{MEGABYTES}mb", ssr_mode=False, **keys,
    )  # fmt: skip
    return page


def main(
    model: Annotated[list[str] | None, typer.Option(help="A run folder; several: a menu")] = None,
    host: Annotated[str, typer.Option(help="0.0.0.0 lets others in")] = "127.0.0.1",
    port: int = 7860,
    share: Annotated[bool, typer.Option(help="a public link through gradio.live")] = False,
) -> None:
    """Serve the demo until it is interrupted."""
    folders = model or [str(Path(__file__).with_name("nano"))]
    serve(folders, server_name=host, server_port=port, share=share)


if __name__ == "__main__":
    typer.run(main)
