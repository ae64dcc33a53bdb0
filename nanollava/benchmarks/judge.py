"""A judge: a larger model, behind lmms-eval's own providers, that scores what another one said.

    export OPENAI_API_KEY=... OPENAI_API_URL=https://.../v1 MODEL_VERSION=gpt-4o-2024-11-20

What it said is kept by content in data/judged.jsonl ($NANOLLAVA_JUDGED): the same question to the
same judge is asked once, and a sweep that is stopped goes on. A judgement that cannot be had or
read is no score; how many there are stands beside the mean.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from lmms_eval.llm_judge import Request, ServerConfig, ServerInterface, get_server
from PIL.Image import Image

from nanollava.evaluate import add_line, read_lines

STATES = ("judged", "refused", "unreadable", "failed")
STOP = 3  # questions in a row without an answer, and no more are asked
lock, missed = Lock(), []


class JudgeDown(OSError):
    """The endpoint does not answer."""


@dataclass(frozen=True)
class Judgement:
    """What a judge said about one answer."""

    state: str  # of STATES
    points: float | tuple[float, float] | None = None
    text: str = ""
    model: str = ""  # as the endpoint names itself


def judge_id() -> str:
    """The judge asked for; ValueError where none is."""
    kind = os.environ.get("API_TYPE", "openai")
    if kind.startswith("async"):
        raise ValueError(f"API_TYPE={kind} cannot be asked from several threads; drop async_")
    if not os.environ.get("MODEL_VERSION") or (
        kind == "openai" and not os.environ.get("OPENAI_API_KEY")
    ):
        raise ValueError(
            "needs a judge: set MODEL_VERSION, OPENAI_API_KEY and, unless it is "
            "OpenAI's, OPENAI_API_URL"
        )
    return os.environ["MODEL_VERSION"]


def kept_in() -> Path:
    """Where judgements are kept; each process has a file of its own."""
    file = Path(os.environ.get("NANOLLAVA_JUDGED", "data/judged.jsonl"))
    return file.with_stem(file.stem + os.environ.get("RANK", "0").strip("0"))


@cache
def known(file: Path) -> dict[str, dict]:
    """Key -> what was said, of a file and those of other processes."""
    files = file.parent.glob(f"{file.stem.rstrip('0123456789')}*{file.suffix}")
    return {row["key"]: row for each in sorted(files) for row in read_lines(each)}


@cache
def server(model: str, kind: str, url: str, seconds: float) -> ServerInterface:
    """lmms-eval's provider; OpenAI's client tries four times, and leaves one that stalls."""
    config = ServerConfig(model, num_retries=1 if kind == "openai" else 3)
    found = get_server(kind, config)
    if kind == "openai":
        found.client = found.client.with_options(timeout=seconds, max_retries=3)
    return found


def refused(error: Exception) -> bool:
    """The endpoint answered: it will not judge this (a content filter, or no text at all)."""
    none = isinstance(error, AttributeError) and "'strip'" in str(error)  # of lmms-eval's provider
    return none or type(error).__name__ == "BadRequestError"


def ask(messages: Sequence[dict], images: Sequence[Image] = (), room: int = 1024) -> dict:
    """The judge's {"text", "model"}, new or kept; "text" is "" where it refuses.

    Raises OSError for no answer, JudgeDown at once after STOP of those in a row.
    """
    model, kind = judge_id(), os.environ.get("API_TYPE", "openai")
    url = os.environ.get("OPENAI_API_URL", "")
    seen = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    asked = [message["content"] for message in messages]
    key = hashlib.sha256(json.dumps([model, url, asked, seen, room]).encode()).hexdigest()[:24]
    file = kept_in()
    if key in known(file):
        return known(file)[key]
    if len(missed) >= STOP:
        raise JudgeDown(
            f"{model} did not answer {STOP} times in a row ({missed[-1]:.200}). "
            f"{len(known(file))} judgements are kept in {file}: run it again"
        )
    provider = server(model, kind, url, float(os.environ.get("JUDGE_SECONDS", 60)))
    config = replace(provider.config, max_tokens=room)
    try:
        found = provider.evaluate(Request(deepcopy([*messages]), images=[*images], config=config))
        row = {"text": found.content or "", "model": found.model_used or model}
    except Exception as error:  # each provider has its own
        if not refused(error):
            missed.append(f"{type(error).__name__}: {error}")
            raise OSError(f"{model}: {missed[-1]:.200}") from error
        row = {"text": "", "model": model}
    with lock:
        missed.clear()
        row = {"key": key, **row, "asked": asked}
        file.parent.mkdir(parents=True, exist_ok=True)
        add_line(file, row)
        known(file)[key] = row
    return row


def judge(
    messages: Sequence[dict],
    read: Callable[[str], Any],
    images: Sequence[Image] = (),
    room: int = 1024,
) -> Judgement:
    """One judgement; `read` finds the score in what was said, or None."""
    try:
        found = ask(messages, images, room)
    except JudgeDown:
        raise
    except OSError as error:
        return Judgement("failed", text=str(error))
    score = read(found["text"])
    state = "judged" if score is not None else "unreadable" if found["text"] else "refused"
    return Judgement(state, score, found["text"], found["model"])


def results(found: Judgement) -> dict:
    """What a task's process_results returns: the score, and one count for each state."""
    return {"judge_score": asdict(found), **{state: int(found.state == state) for state in STATES}}


def mean(found: Sequence[dict]) -> float | None:
    """The mean over those that are scores, if any is."""
    scores = [row["points"] for row in found if row["points"] is not None]
    return sum(scores) / len(scores) if scores else None


def final_score(text: str) -> float | None:
    """'... Final Score: 85' -> 85.0, of 0 to 100."""
    found = re.search(r"Final Score:\s*\**\s*(\d+(?:\.\d+)?)", text)
    return float(found[1]) if found and float(found[1]) <= 100 else None


def detail_score(text: str) -> float | None:
    """ "{'score': 4}" -> 4.0, of 0 to 5."""
    found = re.search(r"""['"]score['"]\s*:\s*['"]?(\d+(?:\.\d+)?)""", text)
    return float(found[1]) if found and float(found[1]) <= 5 else None
