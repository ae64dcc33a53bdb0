"""Re-captioning: a model describes a source's images -> parquet files, a source for stage 1.5.

    python -m nanollava recaption json:./list.json+images.zip --model runs/mine --out data/new
    composer -n 8 -m nanollava recaption blip558k --model FOLDER --out data/new

The prompt is the blog's (Dataset Card). Records come in chunks, and process r of n takes the chunks
r, r + n, r + 2n, ... A chunk leaves two files: its captions, and then its counts. The same command
resumes after the last complete chunks, on any number of processes. Captions that are empty, cut off
or repeat themselves are left out, and so are records without exactly one readable image; the file
of counts names each of them.
"""

import json
import os
import re
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from nanollava.evaluate import Answer, answer_all
from nanollava.files import repository_file, weights_digest, write_atomically
from nanollava.generate import Assistant, load
from nanollava.prompts import PLACEHOLDER, Turn
from nanollava.recipe import Source, read_recipe
from nanollava.sources import images_of, records

PROMPT = "Please generate detailed descriptions of the given image."
CHUNK = 512  # records of a chunk: the most that an interruption can cost
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")  # 一, two
RUN = 4  # words; a caption that repeats itself has few distinct runs of so many words
SHORT, DISTINCT = 24, 0.5  # captions of fewer words may repeat; of others, this share is distinct
LeftOut = list[tuple[str, str]]  # id and reason of each record without a new caption
CARD = Path(__file__).with_name("caption_card.md")  # the dataset card, with places to fill


def find_source(name: str, samples: int) -> Source:
    """KIND:WHERE or FILE.py:function as in a recipe, or a name in recipes/sources.yaml."""
    known = read_recipe(repository_file("sources.yaml")).sources
    if ":" not in name and name not in known:
        expected = f"KIND:WHERE, FILE.py:function, or one of {', '.join(known)}"
        raise ValueError(f"{name!r} is not a source: write {expected}")
    return replace(known.get(name, Source(name)), samples=samples)


def reject_reason(answer: Answer) -> str:
    """Why a caption is left out; empty for a good one."""
    if not answer.tokens:  # the model saw no visual token
        return "unreadable image"
    words = WORD.findall(answer.text)  # each Chinese or Japanese character is a word
    if not words:
        return "empty"
    if answer.cut:
        return "cut off"
    runs = [tuple(words[i : i + RUN]) for i in range(len(words) - RUN + 1)]
    if len(words) >= SHORT and len(set(runs)) < DISTINCT * len(runs):
        return "repeats itself"
    return ""


def describe(
    assistant: Assistant, chunk: list[dict], prompt: str, max_new_tokens: int, title: str
) -> tuple[list[dict], LeftOut]:
    """Records -> records with new captions, and those that are left out."""
    kept: list[dict] = []
    left_out: LeftOut = []
    question = f"{PLACEHOLDER}\n{prompt}"
    turns = [Turn("user", question, 1)]
    items = []  # what `answer_all` takes: turns, images, and anything else
    for record in chunk:
        record = record | {"id": str(record["id"])}  # as the column of ids needs it
        try:
            (image,) = images_of(record)
        except (ValueError, OSError) as error:  # no image, several, or a file that is missing
            left_out.append((record["id"], f"no single image: {error}"))
        else:
            items.append((turns, [image], record))
    answers = answer_all(assistant, assistant.model.writer(), items, max_new_tokens, title)
    for (_, [image], record), answer in zip(items, answers, strict=True):
        reason = reject_reason(answer)
        if reason:
            left_out.append((record["id"], reason))
            continue
        conversations = [
            {"from": "human", "value": question},
            {"from": "gpt", "value": answer.text},
        ]
        new = {"id": record["id"], "image": {"bytes": image, "path": None}}
        new |= {"conversations": conversations, "data_source": record["source"]}
        kept.append(new)
    return kept, left_out


def write_chunk(folder: Path, number: int, kept: list[dict], left_out: LeftOut) -> None:
    """Write a chunk's captions, then its counts: a chunk that has counts is complete."""
    from datasets import Dataset, Features, Image, Value

    text = Value("string")
    turn = {"from": text, "value": text}
    columns = {"id": text, "image": Image(), "conversations": [turn], "data_source": text}
    if kept:
        table = Dataset.from_list(kept, features=Features(columns))
        with write_atomically(folder / f"{number:05}.parquet") as file:
            table.to_parquet(file)
    counts = {"kept": len(kept), "left out": left_out}
    with write_atomically(folder / f"{number:05}.json") as file:
        file.write_text(json.dumps(counts, indent=1))


def check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Write down a new folder's settings; ValueError where it was started with different ones."""
    file = folder / "asked.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        # Several processes may do this at once, so each writes a file of its own and renames it:
        # nobody reads half a file.
        draft = folder / f"asked.{os.getpid()}"
        draft.write_text(json.dumps(settings, indent=1))
        os.replace(draft, file)
    before = json.loads(file.read_text())
    changed = [key for key, value in settings.items() if before.get(key) != value]
    if changed:
        changes = [f"{key}: {before.get(key)} -> {settings[key]}" for key in changed]
        message = f"{folder} was started with different settings: {'; '.join(changes)}"
        raise ValueError(f"{message}. Use the same ones to resume, or give another --out")


def dataset_card(folder: Path, settings: dict[str, Any], source: Source) -> str:
    """The README of a folder whose chunks are complete."""
    files = sorted(folder.glob("[0-9]*.json"))
    chunks = [json.loads(file.read_text()) for file in files]
    reasons: Counter[str] = Counter()
    for chunk in chunks:
        reasons.update(reason.split(":")[0] for _, reason in chunk["left out"])
    left_out = [f"{number:,} {reason}" for reason, number in reasons.most_common()]
    return CARD.read_text().format(
        **settings,
        origin=f" ({source.origin})" if source.origin else "",
        short=SHORT,
        distinct=DISTINCT,
        kept=sum(chunk["kept"] for chunk in chunks),
        licence=source.licence or "not stated",
        left_out=", ".join(left_out) or "none",
        folder=os.path.relpath(folder),
    )


def recaption(
    source: str, model: Path, out: Path, prompt: str, max_new_tokens: int, samples: int, seed: int
) -> None:
    """Describe a source's images with a model; resumes if interrupted."""
    rank = int(os.environ.get("RANK", 0))
    world = int(os.environ.get("WORLD_SIZE", 1))
    found = find_source(source, samples)
    stream = records(found, seed)
    chunk = list(islice(stream, CHUNK))  # if it cannot be read, that shows before `out` is made
    if not chunk:
        raise ValueError(f"{source} has no records: give a source that has some")
    assistant = load(model)
    settings = {"source": source, "samples": samples, "seed": seed, "prompt": prompt}
    settings |= {"model": model.resolve().name, "weights": weights_digest(model)}
    settings |= {"max_new_tokens": max_new_tokens}
    check_settings(out, settings)
    counts: list[Path] = []  # the file that completes each chunk
    while chunk:
        number = len(counts)
        counts.append(out / f"{number:05}.json")
        if number % world == rank and not counts[-1].exists():
            kept, left_out = describe(assistant, chunk, prompt, max_new_tokens, f"chunk {number}")
            write_chunk(out, number, kept, left_out)
        chunk = list(islice(stream, CHUNK))
    if all(file.exists() for file in counts):  # true for the process that finishes last
        (out / "README.md").write_text(dataset_card(out, settings, found))
        print(f"The captions and their dataset card are in {out}")
