"""nanollava as a model of lmms-eval, whose scores the blog prints.

    pip install lmms-eval==0.7.3
    lmms-eval eval --model nanollava --tasks docvqa_val,chartqa \\
        --model_args pretrained=runs/mine,max_grid=6x6,max_visual_tokens=7290

Arguments beyond `pretrained`, `device` and `max_frames` are visual keys of the recipe. Batches are
made by tokens, `batch_size` is not needed. Answers are greedy and end with the turn, whatever a
task's `until` says, as in the released code's wrapper. On several GPUs: `accelerate launch -m
lmms_eval ...`. With `answers=FOLDER`, answers are kept there as they come, and what was answered
before is not asked again.
"""

import hashlib
import logging
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.tasks import TaskManager
from loguru import logger

from nanollava.anyres import MAX_PIXELS, open_image
from nanollava.benchmarks.blog import chosen, judge_column, judge_of, row_of, show, tell_price
from nanollava.evaluate import (
    AHEAD,
    Answer,
    add_line,
    answer_all,
    ranks,
    read_lines,
    weights_digest,
)
from nanollava.extras.video import open_video
from nanollava.files import repository_file
from nanollava.generate import load
from nanollava.prompts import PLACEHOLDER, Turn
from nanollava.recipe import with_visual

ROOM = 1024  # tokens of an answer where a task does not say, as in the released code's wrapper
log = logging.getLogger(__name__)


def manifest() -> Any:
    """What lmms-eval finds by the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="nanollava", chat_class_path=f"{__name__}.Nanollava")


class Nanollava(lmms):
    """A run or a LlavaOnevision folder that answers lmms-eval's questions."""

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        device: str = "",
        max_frames: int = 32,
        batch_size: int = 1,
        max_batch_size: int | None = None,
        answers: str = "",
        **visual: Any,
    ):
        super().__init__()
        self.kept, self.wrong = Path(answers) if answers else None, []
        self.weights = weights_digest(Path(pretrained)) if answers else ""
        self.assistant, self.frames, self.batch_size = load(pretrained, device), max_frames, 1
        model = self.assistant.model
        self.device = model.newline.device
        film = {"max_grid": "base", "pool_stride": 2}  # a frame is one view, pooled: 27x27 -> 14x14
        self.writers = {
            kind: model.writer(with_visual(model.recipe, visual | keys).visual)
            for kind, keys in (("image", {}), ("video", film))
        }

    def read(self, request: Instance) -> tuple[str, list[Turn], list]:
        """A request -> "image" or "video", its turns, its images or frames."""
        _, to_messages, _, name, task, split = request.args
        kind, turns, pictures, system = "image", [], [], ""
        for message in to_messages(self.task_dict[task][split][name]):
            text, before = "", len(pictures)
            for part, more in pairwise([*message["content"], {"type": "end"}]):
                if part["type"] == "text":
                    text += part["text"]
                    continue
                if part["type"] not in ("image", "video"):
                    raise ValueError(f"{task} {name} holds {part['type']}: only images and videos")
                found = [part["url"]]
                if part["type"] == "video":
                    kind = "video"
                    found = open_video(part["url"], self.frames, 10 * MAX_PIXELS)  # an hour of 720p
                pictures += found  # several images are told apart by a space, frames are not
                text += PLACEHOLDER * len(found) + (" " if more["type"] == "image" else "\n")
            if message["role"] == "system":
                system = f"{text}\n"
                continue
            turns.append(Turn(message["role"], system + text, len(pictures) - before))
            system = ""
        return kind, turns, pictures

    def key(self, kind: str, turns: list[Turn], pictures: list, room: int) -> str:
        """Tells a question to these weights at these settings apart, by its content."""
        asked = (self.weights, self.frames, self.writers[kind].visual, turns, room)
        digest = hashlib.sha256(f"{asked}".encode())
        for picture in pictures:
            image = open_image(picture)
            digest.update(f"{image.size}".encode() + image.tobytes())
        return digest.hexdigest()[:24]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers, as they were asked; what cannot be read is named, and its answer is empty."""
        known, answers, waiting, held = {}, [""] * len(requests), [], 0
        if self.kept:
            self.kept.mkdir(parents=True, exist_ok=True)
        for file in self.kept.glob("answers*.jsonl") if self.kept else ():
            known |= {row["key"]: row["text"] for row in read_lines(file)}
        for i, request in enumerate(requests):
            room = int(request.args[2].get("max_new_tokens") or ROOM)
            try:
                kind, turns, pictures = self.read(request)
                key = self.key(kind, turns, pictures, room) if self.kept else ""
            except (ValueError, OSError) as error:
                self.wrong.append(f"{request.args[4]} {request.args[3]}")
                log.warning("%s: %s; counted as wrong", self.wrong[-1], error)
                continue
            if key in known:
                answers[i] = known[key]
                continue
            waiting.append(((kind, room), (turns, pictures, i, key)))
            held += len(pictures)
            if held >= AHEAD:  # no more images than these in memory
                self.answer(waiting, answers, request.task_name)
                waiting, held = [], 0
        if waiting:
            self.answer(waiting, answers, requests[0].task_name)
        return answers

    def answer(self, waiting: list[tuple], answers: list[str], title: str) -> None:
        """Fill in the answers to what waits, and keep each as it comes."""

        def keep(item: tuple, answer: Answer) -> None:
            answers[item[2]] = answer.text
            if self.kept:
                file = self.kept / f"answers{self.rank or ''}.jsonl"
                add_line(file, {"key": item[3], "text": answer.text})

        for kind, room in dict.fromkeys(group for group, _ in waiting):
            items = [item for group, item in waiting if group == (kind, room)]
            answer_all(self.assistant, self.writers[kind], items, room, title, keep)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not for this model: the blog's tasks all ask for text."""
        raise NotImplementedError("nanollava answers in text; choose a task of generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not for this model: none of the blog's tasks asks in rounds."""
        raise NotImplementedError("nanollava answers in text; choose a task of generate_until")


def load_task(task: str, manager: Any) -> Any:
    """lmms-eval's task with its data; ValueError for data without a column that it reads."""
    from lmms_eval.api.task import ConfigurableTask
    from lmms_eval.tasks import get_task_dict
    from tenacity import stop_after_attempt

    for part in (ConfigurableTask.download, ConfigurableTask.process_results):
        part.retry.stop, part.retry.reraise = stop_after_attempt(1), True  # the reason, at once
    found = get_task_dict([task], manager, "chat")[task]
    target, columns = found.config.doc_to_target, found.eval_docs_no_media.column_names
    if isinstance(target, str) and target.isidentifier() and target not in columns:
        raise ValueError(f"its data have no column {target!r}, only {columns}")
    return found


def score_task(model: Any, task: str, manager: Any, limit: int, folder: Path) -> dict[str, Any]:
    """Metric -> value of one task, as lmms-eval's evaluator finds them."""
    from lmms_eval.evaluator import simple_evaluate

    judged, model.wrong = bool(judge_column(task)), []
    args = Namespace(process_with_media=False, output_path=str(folder))  # answers need no images
    found = simple_evaluate(
        model=model,
        tasks=[load_task(task, manager)],
        limit=limit or None,
        batch_size=1,
        bootstrap_iters=0,
        log_samples=True,
        verbosity="ERROR",
        cli_args=args,
        process_docs_parallel=4 if judged else 1,  # some tasks guess at random
        distributed_executor_backend="torchrun",  # accelerate knows no second process on a CPU
    )
    if found is None:  # the first process has them
        return {}
    values: dict[str, Any] = {"n": len(found["samples"][task]), "unreadable images": model.wrong}
    for name, value in found["results"][task].items():
        metric = name.split(",")[0]
        if isinstance(value, int | float) and "stderr" not in metric:
            values[metric] = float(value)
    if judged:
        judges = {row["judge_score"]["model"] for row in found["samples"][task]} - {""}
        values["judges"] = sorted(judges)
    return values


def score_once(model: Any, task: str, manager: Any, asked: dict[str, Any], file: Path) -> dict:
    """A task's values, as they were measured before or now."""
    tell_price(task, asked["limit"])
    key = {"task": task, **judge_of(task), **asked}
    found = next((row for row in read_lines(file) if key.items() <= row.items()), None)
    if found is None:
        found = {**key, "values": score_task(model, task, manager, asked["limit"], file.parent)}
        if found["values"] and not found["values"].get("failed"):  # else it is asked again
            add_line(file, found)
    return found["values"]


def run_benchmarks(run: Path, names: Sequence[str], limit: int = 0, beside: str = "T4:0") -> None:
    """Score a run on benchmarks; goes on where it was stopped."""
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is no folder: give a run's, or a LlavaOnevision's")
    logger.remove()
    logger.add(sys.stderr, level="WARNING")
    row_of(beside)  # what is wrong with it is told now
    rank, world = ranks()
    manager, rows, reasons = TaskManager("ERROR", include_path=str(repository_file("eval"))), {}, {}
    tasks = chosen(names, manager.all_subtasks)
    model = Nanollava(str(run), answers=str(run))
    visual = asdict(model.writers["image"].visual)
    asked = {"weights": model.weights, "limit": limit, "visual": visual}
    for task in tasks:
        try:
            rows[task] = score_once(model, task, manager, asked, run / "benchmarks.jsonl")
        except (Exception, SystemExit) as error:  # a task is foreign code; the others go on
            if world > 1:
                raise  # the other processes would wait for this one
            told = "" if isinstance(error, ValueError | OSError) else f"{type(error).__name__}: "
            reasons[task] = f"{told}{error}".split("\n")[0][:200] or type(error).__name__
    if rank == 0:
        show(rows, reasons, beside, limit)
