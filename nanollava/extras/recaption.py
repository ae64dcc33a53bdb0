"""Re-captioning: a model describes a source's images -> parquet files, a source for stage 1.5.

    python -m nanollava recaption json:./list.json+images.zip --model runs/mine --out data/new
    composer -n 8 -m nanollava recaption blip558k --model FOLDER --out data/new

The prompt is the blog's (Dataset Card). Records come in chunks; with n processes, chunk k is the
work of process k mod n, and its count appears when it is whole: the same command goes on where it
was stopped, on any number of processes. A caption that is empty, cut off or repeats itself is left
out, like an image that cannot be read: counted, and named beside the chunk.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, count, islice
from pathlib import Path
from typing import Any

from nanollava.evaluate import Answer, answer_all, weights_digest
from nanollava.files import repository_file, write_atomically
from nanollava.prompts import PLACEHOLDER, Turn
from nanollava.recipe import Source, read_recipe
from nanollava.sources import images_of, records

PROMPT = "Please generate detailed descriptions of the given image."
CHUNK = 512  # records of a file: the most that a stop can cost
FEW, DISTINCT = 24, 0.5  # from so many words on, this share of its runs of 4 words are distinct
WORD = re.compile(r"[\u3040-\u30ff\u3400-\u9fff]|[^\s\u3040-\u30ff\u3400-\u9fff]+")  # 一, two


def find_source(name: str, samples: int) -> Source:
    """KIND:WHERE or FILE.py:function as in a recipe, or a name in recipes/sources.yaml."""
    known = read_recipe(repository_file("sources.yaml")).sources
    if ":" not in name and name not in known:
        raise ValueError(
            f"{name!r} is no source: write KIND:WHERE, FILE.py:NAME, or one of {[*known]}"
        )
    return replace(known.get(name, Source(name)), samples=samples)


def fault(answer: Answer) -> str:
    """What is wrong with a caption, or nothing."""
    words = WORD.findall(answer.text)  # a Chinese character is one
    if not words:
        return "empty"
    if answer.cut:
        return "cut off"
    runs = [tuple(words[i : i + 4]) for i in range(len(words) - 3)]
    return "repeats itself" if len(words) >= FEW and len({*runs}) < DISTINCT * len(runs) else ""


def describe(
    assistant: Any, found: list[dict], prompt: str, room: int, title: str
) -> tuple[list[dict], list[tuple[str, str]]]:
    """Records -> rows with new captions, and (id, reason) of each that was left out."""
    kept, left, items = [], [], []
    for record in found:
        try:
            (image,) = images_of(record)
        except (ValueError, OSError) as error:  # none, several, or one that is not there
            left.append((record["id"], f"no single image: {error}"))
            continue
        items.append(([Turn("user", f"{PLACEHOLDER}\n{prompt}", 1)], [image], record))
    answers = answer_all(assistant, assistant.model.writer(), items, room, title)
    for (_, (image,), record), answer in zip(items, answers, strict=True):
        if reason := fault(answer) if answer.tokens else "unreadable image":
            left.append((record["id"], reason))
            continue
        talk = [
            {"from": "human", "value": f"{PLACEHOLDER}\n{prompt}"},
            {"from": "gpt", "value": answer.text},
        ]
        row = {"id": record["id"], "image": {"bytes": image, "path": None}, "conversations": talk}
        kept.append({**row, "data_source": record["source"]})
    return kept, left


def write(folder: Path, k: int, kept: list[dict], left: list[tuple[str, str]]) -> None:
    """A chunk's captions, and then its count: where that is, the chunk is whole."""
    from datasets import Dataset, Features, Image, Value

    turn, text = {"from": Value("string"), "value": Value("string")}, Value("string")
    features = {"id": text, "image": Image(), "conversations": [turn], "data_source": text}
    if kept:
        with write_atomically(folder / f"{k:05}.parquet") as half:
            Dataset.from_list(kept, features=Features(features)).to_parquet(half)
    with write_atomically(folder / f"{k:05}.json") as half:
        half.write_text(json.dumps({"kept": len(kept), "left out": left}, indent=1))


def settle(folder: Path, asked: dict[str, Any]) -> None:
    """Note what is asked; ValueError where the folder was begun with something else."""
    file = folder / "asked.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():  # other processes read it meanwhile
        half = folder / f"asked.{os.getpid()}"
        half.write_text(json.dumps(asked, indent=1))
        os.replace(half, file)
    begun = json.loads(file.read_text())
    if changed := [f"{k}: {begun.get(k)} -> {v}" for k, v in asked.items() if begun.get(k) != v]:
        raise ValueError(f"{folder} was begun otherwise: {'; '.join(changed)}. Give another --out")


CARD = """# Re-captions

Images of `{source}`{origin}, described by `{model}` (weights {weights}).

- prompt: "{prompt}", at most {max_new_tokens} tokens, greedy
- {kept:,} captions; left out: {left}
- filters: empty, cut off at the limit, repeating (of {few} words or more, below {distinct:.0%} of
  the runs of four words are distinct)
- licence of the source: {licence}; the captions are the model's

As a source of a recipe: `path: "parquet:{folder}/*.parquet"`
"""


def card(folder: Path, asked: dict[str, Any], source: Source) -> str:
    """The dataset card."""
    told = [json.loads(file.read_text()) for file in sorted(folder.glob("[0-9]*.json"))]
    reasons = Counter(why.split(":")[0] for chunk in told for _, why in chunk["left out"])
    return CARD.format(
        **asked,
        origin=f" ({source.origin})" if source.origin else "",
        few=FEW,
        distinct=DISTINCT,
        kept=sum(chunk["kept"] for chunk in told),
        licence=source.licence or "not stated",
        left=", ".join(f"{n:,} {why}" for why, n in reasons.most_common()) or "none",
        folder=os.path.relpath(folder),
    )


def chunks(source: Source, seed: int) -> Iterator[tuple[int, list[dict]]]:
    """The source's records, in numbered chunks."""
    found = records(source, seed)
    for k in count():
        if not (some := list(islice(found, CHUNK))):
            return
        yield k, [record | {"id": str(record["id"])} for record in some]


def recaption(
    source: str, model: Path, out: Path, prompt: str, max_new_tokens: int, samples: int, seed: int
) -> None:
    """Describe a source's images with a model; goes on where it was stopped."""
    from nanollava.generate import load

    rank, world = (int(os.environ.get(key, n)) for key, n in (("RANK", 0), ("WORLD_SIZE", 1)))
    found, files = find_source(source, samples), []
    todo = chunks(found, seed)
    if not (first := next(todo, None)):  # before anything is begun
        raise ValueError(f"{source} has no records")
    assistant = load(model)
    asked = {"source": source, "samples": samples, "seed": seed, "prompt": prompt}
    asked |= {"model": model.resolve().name, "weights": weights_digest(model)}
    asked |= {"max_new_tokens": max_new_tokens}
    settle(out, asked)
    for k, some in chain([first], todo):
        files.append(out / f"{k:05}.json")
        if k % world == rank and not files[-1].exists():
            write(out, k, *describe(assistant, some, prompt, max_new_tokens, f"chunk {k}"))
    if all(file.exists() for file in files):  # the last process to end finds them all
        (out / "README.md").write_text(card(out, asked, found))
        print(f"captions and their card are in {out}")
