"""nanollava as a model of lmms-eval, and a run over the blog's benchmarks.

lmms-eval finds the model by its entry point and asks it questions:

    pip install lmms-eval==0.7.3
    lmms-eval eval --model nanollava --tasks docvqa_val,chartqa \\
        --model_args pretrained=runs/mine,max_grid=6x6,max_visual_tokens=7290

Arguments other than `pretrained`, `device`, `max_frames` and `answers` are visual keys of the
recipe. Answers are decoded greedily and end with the turn, whatever a task's `until` says, as in
the released code's wrapper. Batches are made by tokens, so `batch_size` has no effect. With
`answers=FOLDER`, each answer is kept there as it comes, and a question that was answered before is
not asked again. On several GPUs: `accelerate launch -m lmms_eval ...`.

`run_benchmarks` asks and scores in one command, and prints our scores next to the blog's:

    python -m nanollava evaluate runs/mine --tasks blog
    python -m nanollava evaluate runs/mine --tasks docvqa_val,pope --limit 100
    composer -n 8 -m nanollava evaluate runs/mine --tasks blog

Each task that was scored is one line of benchmarks.jsonl in the run folder, so the same command
resumes if interrupted. A task that cannot be scored is listed with the reason.
"""

import hashlib
import sys
from argparse import Namespace
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager, get_task_dict
from loguru import logger
from tenacity import stop_after_attempt

from nanollava.anyres import MAX_PIXELS, open_image
from nanollava.benchmarks import blog, judge
from nanollava.evaluate import Answer, add_line, answer_all, ranks, read_lines, weights_digest
from nanollava.extras.video import open_video
from nanollava.files import repository_file
from nanollava.generate import load
from nanollava.prompts import PLACEHOLDER, Turn
from nanollava.recipe import with_visual

MAX_NEW_TOKENS = 1024  # where a task does not say, as in the released code's wrapper
AHEAD = 256  # images that wait in memory
EVALUATOR = {"batch_size": 1, "bootstrap_iters": 0, "log_samples": True, "verbosity": "ERROR"}


class Question(NamedTuple):
    """One question to the model. `answer_all` reads the first two fields."""

    turns: list[Turn]
    images: list  # images, or the frames of a video
    kind: str  # "image" or "video"
    max_new_tokens: int
    place: int  # among lmms-eval's requests
    key: str  # what its answer is kept under, if answers are kept


def manifest() -> Any:
    """What lmms-eval's entry point calls to find the model."""
    # Imported here, because lmms_eval.models calls the entry point while it is being imported.
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="nanollava", chat_class_path=f"{__name__}.Nanollava")


class Nanollava(lmms):
    """A run or a LlavaOnevision folder that answers lmms-eval's questions."""

    is_simple = False  # lmms-eval hands over conversations, not texts

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
        self.folder = Path(answers) if answers else None  # where answers are kept
        self.weights = weights_digest(Path(pretrained)) if answers else ""
        self.unreadable: list[str] = []  # questions whose image or video cannot be read
        self.assistant = load(pretrained, device)
        self.max_frames, self.batch_size = max_frames, 1
        model = self.assistant.model
        self.device = model.newline.device
        frames = {"max_grid": "base", "pool_stride": 2}  # one view each, pooled: 27x27 -> 14x14
        self.writers = {
            "image": model.writer(with_visual(model.recipe, visual).visual),
            "video": model.writer(with_visual(model.recipe, visual | frames).visual),
        }

    def read(self, request: Instance, place: int = 0) -> Question:
        """A request -> the question. Raises ValueError or OSError if its media cannot be read."""
        _, to_messages, settings, name, task, split = request.args
        kind, turns, images, system = "image", [], [], ""
        for message in to_messages(self.task_dict[task][split][name]):
            text, before = "", len(images)
            for part, following in pairwise([*message["content"], {"type": "end"}]):
                if part["type"] == "text":
                    text += part["text"]
                    continue
                pictures = [part["url"]]
                if part["type"] == "video":
                    kind = "video"
                    # The limit allows an hour of video at 720p.
                    pictures = open_video(part["url"], self.max_frames, 10 * MAX_PIXELS)
                elif part["type"] != "image":
                    raise ValueError(f"a part is {part['type']!r}; expected text, image or video")
                images += pictures
                # As in the released code, a space separates images, and nothing separates frames.
                separator = " " if following["type"] == "image" else "\n"
                text += PLACEHOLDER * len(pictures) + separator
            if message["role"] == "system":
                system = f"{text}\n"  # begins the next turn
                continue
            turns.append(Turn(message["role"], system + text, len(images) - before))
            system = ""
        max_new_tokens = int(settings.get("max_new_tokens") or MAX_NEW_TOKENS)
        key = self.key(kind, turns, images, max_new_tokens) if self.folder else ""
        return Question(turns, images, kind, max_new_tokens, place, key)

    def key(self, kind: str, turns: list[Turn], images: list, max_new_tokens: int) -> str:
        """A hash of a question's content, of these weights and of these settings."""
        visual = self.writers[kind].visual
        settings = (self.weights, self.max_frames, visual, turns, max_new_tokens)
        digest = hashlib.sha256(f"{settings}".encode())
        for picture in images:
            image = open_image(picture)
            digest.update(f"{image.size}".encode() + image.tobytes())
        return digest.hexdigest()[:24]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Answers in the order of the requests; "" if an image or video cannot be read."""
        kept = judge.kept_lines(self.folder, "answers*.jsonl") if self.folder else {}
        answers = [""] * len(requests)
        waiting: list[Question] = []
        for place, request in enumerate(requests):
            try:
                question = self.read(request, place)
            except (ValueError, OSError) as error:
                self.unreadable.append(f"{request.args[4]} {request.args[3]}")
                logger.warning(f"{self.unreadable[-1]}: {error}; counted as wrong")
                continue
            if question.key in kept:
                answers[place] = kept[question.key]["text"]
                continue
            waiting.append(question)
            # Answer in portions, so that not all images of a benchmark are in memory at once.
            if sum(len(one.images) for one in waiting) >= AHEAD:
                self.answer(waiting, answers, request.task_name)
                waiting = []
        if waiting:
            self.answer(waiting, answers, requests[0].task_name)
        return answers

    def answer(self, waiting: list[Question], answers: list[str], title: str) -> None:
        """Fill in the answers to the waiting questions, and keep each as it comes."""

        def keep(question: Question, answer: Answer) -> None:
            answers[question.place] = answer.text
            if self.folder:
                self.folder.mkdir(parents=True, exist_ok=True)
                file = self.folder / f"answers{self.rank or ''}.jsonl"
                add_line(file, {"key": question.key, "text": answer.text})

        # A batch has one way of turning images into tokens, and one length of answers.
        groups: dict[tuple, list] = {}
        for question in waiting:
            groups.setdefault((question.kind, question.max_new_tokens), []).append(question)
        for (kind, max_new_tokens), questions in groups.items():
            answer_all(self.assistant, self.writers[kind], questions, max_new_tokens, title, keep)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """lmms-eval's other kinds of questions. None of the blog's tasks asks them."""
        raise NotImplementedError("nanollava answers in text: choose a task of generate_until")

    generate_until_multi_round = loglikelihood


def load_task(task: str, manager: TaskManager) -> ConfigurableTask:
    """lmms-eval's task with its data. Raises ValueError if a column that it reads is missing."""
    for method in (ConfigurableTask.download, ConfigurableTask.process_results):
        method.retry.stop = stop_after_attempt(1)  # the first error is the reason to print
        method.retry.reraise = True
    loaded = get_task_dict([task], manager, "chat")[task]
    target, columns = loaded.config.doc_to_target, loaded.eval_docs_no_media.column_names
    if isinstance(target, str) and target.isidentifier() and target not in columns:
        raise ValueError(f"its data have the columns {columns}; expected {target!r} among them")
    return loaded


def score_task(model: Nanollava, task: str, manager: Any, limit: int, folder: Path) -> dict:
    """Metric -> value of one task, as lmms-eval's evaluator finds them; empty except on rank 0."""
    from lmms_eval.evaluator import simple_evaluate  # imports lmms_eval.models: see `manifest`

    model.unreadable = []
    evaluated = simple_evaluate(
        model=model,
        tasks=[load_task(task, manager)],
        limit=limit or None,
        **EVALUATOR,
        cli_args=Namespace(process_with_media=False, output_path=str(folder)),  # texts are enough
        process_docs_parallel=4 if task in blog.JUDGED else 1,  # some other tasks guess at random
        distributed_executor_backend="torchrun",  # accelerate knows no second process on a CPU
    )
    if evaluated is None:  # only the first process has the result
        return {}
    samples = evaluated["samples"][task]
    values: dict[str, Any] = {"n": len(samples), "unreadable images": model.unreadable}
    for name, value in evaluated["results"][task].items():
        metric = name.split(",")[0]  # "anls,none" -> "anls"
        if isinstance(value, int | float) and "stderr" not in metric:
            values[metric] = float(value)
    if task in blog.JUDGED:
        judges = {sample["judge_score"]["model"] for sample in samples}
        values["judges"] = sorted(judges - {""})
    return values


def judge_settings(task: str) -> dict[str, str]:
    """What else a judged task's score depends on.

    Raises ValueError if no judge is set up, or if the task waits for your images.
    """
    folder = blog.images_folder(task)
    images = sorted((file.name, file.stat().st_size) for file in folder.glob("*"))
    if not images and not blog.JUDGED[task].questions:
        raise ValueError(f"this task needs images of yours: put them into {folder}")
    model, _, endpoint = judge.judge_in_use()
    return {"judge": model, "endpoint": endpoint, "images": f"{images}"}


def score_once(model: Nanollava, task: str, manager: Any, settings: dict, file: Path) -> dict:
    """A task's values, measured now or found in `file`."""
    blog.tell_price(task, settings["limit"])
    judged = judge_settings(task) if task in blog.JUDGED else {}
    key = {"task": task, **judged, **settings}
    for line in read_lines(file):
        if key.items() <= line.items():
            return line["values"]
    values = score_task(model, task, manager, settings["limit"], file.parent)
    if values and not values.get("failed"):  # where a judge failed, the next run asks again
        add_line(file, {**key, "values": values})
    return values


def run_benchmarks(run: Path, names: Sequence[str], limit: int = 0, beside: str = "T4:0") -> None:
    """Score a run on benchmarks and print the scores next to the blog's; resumes if interrupted."""
    blog.row_of(beside)  # a misspelled row is an error now, not when all is scored
    logger.remove()  # lmms-eval logs every step
    logger.add(sys.stderr, level="WARNING")
    rank, world = ranks()
    manager = TaskManager("ERROR", include_path=str(repository_file("eval")))
    tasks = blog.find_tasks(names, manager.all_subtasks)
    model = Nanollava(str(run), answers=str(run))
    visual = vars(model.writers["image"].visual)
    settings = {"weights": model.weights, "limit": limit, "visual": visual}
    results, reasons = {}, {}
    for task in tasks:
        try:
            results[task] = score_once(model, task, manager, settings, run / "benchmarks.jsonl")
        except (Exception, SystemExit) as error:  # a task is foreign code; the others continue
            if world > 1:
                raise  # the other processes would wait for this one
            reason = str(error) if isinstance(error, ValueError | OSError) else repr(error)
            reasons[task] = reason.split("\n")[0][:200]
    if rank == 0:
        blog.show(results, reasons, beside, limit)
