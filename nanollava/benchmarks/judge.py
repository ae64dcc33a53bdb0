"""A judge: a larger model, reached through lmms-eval's own providers, that scores an answer.

    export OPENAI_API_KEY=... OPENAI_API_URL=https://.../v1 MODEL_VERSION=gpt-4o-2024-11-20

What the judge said is kept in data/judged.jsonl ($NANOLLAVA_JUDGED) under a hash of the question:
the same question to the same judge is asked once, and an interrupted run resumes. A question that
the judge refused, or whose answer holds no score, counts as neither right nor wrong; how many there
are is printed next to the mean.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from threading import Lock
from typing import Any

from PIL.Image import Image

from nanollava.files import add_line, read_lines

PATIENCE = 3  # questions in a row that may fail before no more are asked
lock = Lock()  # lmms-eval scores in threads
failures: list[str] = []  # reasons since the last answer


@dataclass(frozen=True)
class Judgement:
    """What a judge said about one answer."""

    state: str  # one of blog.STATES
    points: float | tuple[float, float] | None = None
    text: str = ""
    model: str = ""  # as the endpoint calls itself


def judge_in_use() -> tuple[str, str, str]:
    """The judge's model, its provider and its endpoint, all from the environment.

    Raises ValueError if no judge is set up.
    """
    model, key = os.environ.get("MODEL_VERSION"), os.environ.get("OPENAI_API_KEY")
    provider = os.environ.get("API_TYPE", "openai")
    if provider.startswith("async"):
        raise ValueError(f"API_TYPE={provider} cannot be used from several threads: drop async_")
    if not model or (provider == "openai" and not key):
        more = "OPENAI_API_KEY and, unless it is OpenAI's, OPENAI_API_URL"
        raise ValueError(f"this task needs a judge: set MODEL_VERSION, {more}")
    return model, provider, os.environ.get("OPENAI_API_URL", "")


def judgements_file() -> Path:
    """Where this process keeps its judgements; each has a file of its own."""
    file = Path(os.environ.get("NANOLLAVA_JUDGED", "data/judged.jsonl"))
    return file.with_stem(file.stem + os.environ.get("RANK", "0").strip("0"))


def kept_lines(folder: Path, pattern: str) -> dict[str, dict]:
    """Key -> line, from the .jsonl files of all processes."""
    lines = {}
    for file in sorted(folder.glob(pattern)):
        lines |= {line["key"]: line for line in read_lines(file)}
    return lines


@cache
def kept_judgements(file: Path) -> dict[str, dict]:
    """Key -> judgement, from a process's file and those of the others."""
    return kept_lines(file.parent, f"{file.stem.rstrip('0123456789')}*{file.suffix}")


@cache
def server(model: str, provider: str, url: str, seconds: float) -> Any:
    """lmms-eval's provider. With OpenAI's client, a question that stalls is given up after
    `seconds`, and tried four times in all.
    """
    # Imported here, because lmms_eval.llm_judge itself imports the file `lmms.py` next to this one.
    from lmms_eval.llm_judge import ServerConfig, get_server

    openai = provider == "openai"
    interface = get_server(provider, ServerConfig(model, num_retries=1 if openai else 3))
    if openai:
        interface.client = interface.client.with_options(timeout=seconds, max_retries=3)
    return interface


def refused(error: Exception) -> bool:
    """Did the endpoint answer that it will not judge this (a content filter, or no text at all)?"""
    no_text = isinstance(error, AttributeError) and "'strip'" in str(error)  # lmms-eval's provider
    return no_text or type(error).__name__ == "BadRequestError"


def ask(messages: Sequence[dict], images: Sequence[Image], max_new_tokens: int) -> dict:
    """The judge's {"text", "model"}, new or kept; "text" is "" if it refuses.

    Raises OSError if there is no answer. After PATIENCE of those in a row nothing is asked any
    more, and every new question raises ValueError.
    """
    from lmms_eval.llm_judge import Request  # see `server`

    # 1. The key: whom, where, the text, the pixels and the length.
    model, provider, url = judge_in_use()
    asked = [message["content"] for message in messages]
    pixels = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
    content = json.dumps([model, url, asked, pixels, max_new_tokens])
    key = hashlib.sha256(content.encode()).hexdigest()[:24]
    # 2. Was the same question asked before?
    file = judgements_file()
    kept = kept_judgements(file)
    if key in kept:
        return kept[key]
    if len(failures) >= PATIENCE:
        problem = f"{model} did not answer {PATIENCE} times in a row ({failures[-1]:.200})"
        raise ValueError(f"{problem}. {len(kept)} judgements are kept in {file}: run it again")
    # 3. Ask.
    interface = server(model, provider, url, float(os.environ.get("JUDGE_SECONDS", 60)))
    config = replace(interface.config, max_tokens=max_new_tokens)
    text, name = "", model
    try:
        request = Request(deepcopy([*messages]), images=[*images], config=config)
        reply = interface.evaluate(request)
        text, name = reply.content or "", reply.model_used or model
    except Exception as error:  # each provider raises its own kinds
        if not refused(error):
            failures.append(f"{type(error).__name__}: {error}")
            raise OSError(f"{model}: {failures[-1]:.200}") from error
    # 4. Keep what the judge said; its refusal, too, but not a failure.
    judgement = {"key": key, "text": text, "model": name, "asked": asked}
    with lock:
        failures.clear()
        file.parent.mkdir(parents=True, exist_ok=True)
        add_line(file, judgement)
        kept[key] = judgement
    return judgement


def judge(
    messages: Sequence[dict],
    read: Callable[[str], Any],
    images: Sequence[Image] = (),
    max_new_tokens: int = 1024,
) -> Judgement:
    """One judgement; `read` finds the score in the judge's text, or returns None."""
    try:
        said = ask(messages, images, max_new_tokens)
    except OSError as error:
        return Judgement("failed", text=str(error))
    score = read(said["text"])
    state = "judged"
    if score is None:
        state = "unreadable" if said["text"] else "refused"
    return Judgement(state, score, said["text"], said["model"])
