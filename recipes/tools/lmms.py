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
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms

from nanollava.anyres import open_image
from nanollava.evaluate import AHEAD, add_line, answer_all, read_lines, weights_digest
from nanollava.generate import load
from nanollava.prompts import PLACEHOLDER, Turn
from nanollava.recipe import with_visual
from nanollava.sources import tool

ROOM = 1024  # tokens of an answer where a task does not say, as in the released code's wrapper
log = logging.getLogger(__name__)
open_video = tool("video").open_video


def manifest() -> Any:
    """What lmms-eval finds by the entry point."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="nanollava", chat_class_path=f"{__name__}.Nanollava")


class Nanollava(lmms):
    """A run or a LlavaOnevision folder that answers lmms-eval's questions."""

    is_simple = False

    def __init__(
        self, pretrained: str, device: str = "", max_frames: int = 32, batch_size: int = 1,
        max_batch_size: int | None = None, answers: str = "", **visual: Any,
    ):  # fmt: skip
        super().__init__()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
        self.kept = Path(answers) if answers else None
        self.begins = f"{weights_digest(Path(pretrained))}, {max_frames} frames"
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
            for part in message["content"]:
                if part["type"] == "text":
                    text += part["text"]
                    continue
                if part["type"] not in ("image", "video"):
                    raise ValueError(f"{task} {name} holds {part['type']}: only images and videos")
                if part["type"] == "video":
                    kind = "video"
                    found = open_video(part["url"], self.frames)
                else:
                    found = [part["url"]]
                pictures += found
                text += f"{PLACEHOLDER}\n" * len(found)
            if message["role"] == "system":
                system = f"{text}\n"
                continue
            turns.append(Turn(message["role"], system + text, len(pictures) - before))
            system = ""
        return kind, turns, pictures

    def key(self, kind: str, turns: list[Turn], pictures: list, room: int) -> str:
        """Tells a question to these weights at these settings apart, by its content."""
        digest = hashlib.sha256(
            f"{self.begins} {self.writers[kind].visual} {turns} {room}".encode()
        )
        for picture in pictures:
            image = open_image(picture)
            digest.update(f"{image.size}".encode() + image.tobytes())
        return digest.hexdigest()[:24]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers, as they were asked; what cannot be read is named, and its answer is empty."""
        known, answers = {}, []
        for file in self.kept.glob("answers*.jsonl") if self.kept else ():
            known |= {row["key"]: row["text"] for row in read_lines(file)}
        for start in range(0, len(requests), AHEAD):  # no more images than these in memory
            answers += self.answer(requests[start : start + AHEAD], known)
        return answers

    def answer(self, requests: Sequence[Instance], known: dict[str, str]) -> list[str]:
        """Some requests' answers; new ones are kept."""
        groups: dict[tuple[str, int], list[tuple]] = {}
        answers = [""] * len(requests)
        for i, request in enumerate(requests):
            room = int(request.args[2].get("max_new_tokens") or ROOM)
            try:
                kind, turns, pictures = self.read(request)
                key = self.key(kind, turns, pictures, room) if self.kept else ""
            except (ValueError, OSError) as error:
                log.warning("%s %s: %s; counted as wrong", *request.args[4:2:-1], error)
                continue
            if key in known:
                answers[i] = known[key]
            else:
                groups.setdefault((kind, room), []).append((turns, pictures, i, key))
        for (kind, room), items in groups.items():
            title = requests[0].task_name
            found = answer_all(self.assistant, self.writers[kind], items, room, title)
            for (*_, i, key), answer in zip(items, found, strict=True):
                answers[i] = answer.text
                if self.kept:
                    self.kept.mkdir(parents=True, exist_ok=True)
                    file = self.kept / f"answers{self.rank or ''}.jsonl"
                    add_line(file, {"key": key, "text": answer.text})
        return answers

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Not for this model: the blog's tasks all ask for text."""
        raise NotImplementedError("nanollava answers in text; choose a task of generate_until")

    def generate_until_multi_round(self, requests: Sequence[Instance]) -> list[str]:
        """Not for this model: none of the blog's tasks asks in rounds."""
        raise NotImplementedError("nanollava answers in text; choose a task of generate_until")
