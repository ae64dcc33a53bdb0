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
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from lmms_eval.llm_judge import Request, ServerConfig, get_server
from PIL.Image import Image

from nanollava.evaluate import add_line, read_lines

STATES = ("judged", "refused", "unreadable", "failed")
STOP = 3  # questions in a row that the endpoint does not answer
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
    if not os.environ.get("OPENAI_API_KEY") or not os.environ.get("MODEL_VERSION"):
        raise ValueError("needs a judge: set MODEL_VERSION, OPENAI_API_KEY and, unless it is "
                         "OpenAI's, OPENAI_API_URL")  # fmt: skip
    return os.environ["MODEL_VERSION"]


def kept_in() -> Path:
    """Where judgements are kept."""
    return Path(os.environ.get("NANOLLAVA_JUDGED", "data/judged.jsonl"))


@cache
def known(file: Path) -> dict[str, dict]:
    """Key -> what was said, of a file."""
    return {row["key"]: row for row in read_lines(file)}


@cache
def server(model: str, kind: str, url: str, seconds: float, tries: int):
    """lmms-eval's provider; an endpoint that stalls is left after `seconds`."""
    found = get_server(kind, ServerConfig(model, num_retries=tries, retry_delay=seconds / 60))
    if hasattr(found, "client"):  # the others keep lmms-eval's own limit
        found.client = found.client.with_options(timeout=seconds, max_retries=0)
    return found


def ask(messages: Sequence[dict], images: Sequence[Image] = (), room: int = 1024) -> dict:
    """The judge's {"text", "model"}, new or kept; "text" is "" where it refuses.

    Raises JudgeDown after STOP questions in a row without an answer, OSError for one.
    """
    model = judge_id()
    seen = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    key = hashlib.sha256(json.dumps([model, messages, seen, room]).encode()).hexdigest()[:24]
    file = kept_in()
    if key in known(file):
        return known(file)[key]
    seconds, tries = float(os.environ.get("JUDGE_SECONDS", 60)), 3
    kind, url = os.environ.get("API_TYPE", "openai"), os.environ.get("OPENAI_API_URL", "")
    asked = server(model, kind, url, seconds, tries)
    config = ServerConfig(model, max_tokens=room, num_retries=tries, retry_delay=seconds / 60)
    try:
        found = asked.evaluate(Request([*messages], images=[*images], config=config))
    except Exception as error:  # each provider has its own: whatever it is, there is no answer
        missed.append(key)
        told = f"{type(error).__name__}: {str(error) or 'no answer'}"
        if len(missed) >= STOP:
            missed.clear()
            raise JudgeDown(
                f"{model} did not answer {STOP} times in a row ({told:.200}). "
                f"{len(known(file))} judgements are kept in {file}: run it again"
            ) from error
        raise OSError(f"{model}: {told:.200}") from error
    with lock:
        missed.clear()
        row = {"key": key, "text": found.content or "", "model": found.model_used or model}
        row["asked"] = [message["content"] for message in messages]
        file.parent.mkdir(parents=True, exist_ok=True)
        add_line(file, row)
        known(file)[key] = row
    return row


def judge(
    messages: Sequence[dict], read: Callable[[str], Any], images: Sequence[Image] = (),
    room: int = 1024,
) -> Judgement:  # fmt: skip
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
