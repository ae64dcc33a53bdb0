"""Tasks of lmms-eval as the blog ran them in May 2024, and judged tasks on data that is available.

lmms-eval 0.7.3 asks or scores some of the blog's benchmarks differently today; the .yaml files next
to this one restore the blog's way. Parsers and the judges' prompts are lmms-eval's own, read from
the installed package.

    python -m lmms_eval --model nanollava --model_args pretrained=RUN \\
        --include_path recipes/eval --tasks video_dc_2024
"""

import os
import re
from collections.abc import Sequence
from dataclasses import asdict
from functools import cache, partial
from pathlib import Path
from threading import RLock
from types import ModuleType, SimpleNamespace

import lmms_eval.tasks
from PIL import Image

from nanollava.benchmarks.blog import STATES
from nanollava.benchmarks.judge import Judgement, judge
from nanollava.sources import import_file

total = sum  # an aggregation that the .yaml files name
lock = RLock()  # lmms-eval scores in threads, and below its files are imported and parts replaced
os.environ.setdefault("HF_HOME", str(Path("~/.cache/huggingface").expanduser()))  # it expects one


def theirs(name: str) -> ModuleType:
    """A file of lmms-eval's tasks."""
    with lock:
        return imported(name)


@cache
def imported(name: str) -> ModuleType:
    """Import a file of lmms-eval's tasks by its path.

    Some of their folders have names that Python cannot import, and some files set up a judge while
    they are imported, which needs an API key.
    """
    key = os.environ.get("OPENAI_API_KEY")
    os.environ["OPENAI_API_KEY"] = key or "none"
    module = import_file(f"{Path(lmms_eval.tasks.__file__).parent / name}.py")
    if not key:
        del os.environ["OPENAI_API_KEY"]
    return module


# ---- what a judge said -> a task's score


def results(judgement: Judgement) -> dict:
    """What a task's process_results returns: the score, and a count of one for its state."""
    counts = {state: int(judgement.state == state) for state in STATES}
    return {"judge_score": asdict(judgement), **counts}


def mean(judgements: Sequence[dict]) -> float | None:
    """The mean over the judgements that are scores; None if there is none."""
    points = [judgement["points"] for judgement in judgements if judgement["points"] is not None]
    return sum(points) / len(points) if points else None


def find_score(pattern: str, highest: float, text: str) -> float | None:
    """The number that a pattern finds in a judge's text, unless it is above the highest score."""
    match = re.search(pattern, text)
    return float(match[1]) if match and float(match[1]) <= highest else None


# '... Final Score: 85' -> 85.0
final_score = partial(find_score, r"Final Score:\s*\**\s*(\d+(?:\.\d+)?)", 100)
# "{'score': 4}" -> 4.0
detail_score = partial(find_score, r"""['"]score['"]\s*:\s*['"]?(\d+(?:\.\d+)?)""", 5)


# ---- Image-DC: detailed descriptions of your own images, because the blog's were never released


def picture(doc: dict) -> list[Image.Image]:
    """The image of a row."""
    return [doc["image"].convert("RGB")]


def question_en(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The prompt of the blog's re-captioned data."""
    return "Please generate detailed descriptions of the given image."


def question_cn(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Our translation: the blog prints no Chinese prompt."""
    return "请详细描述这张图片。"


def image_score(doc: dict, answers: list[str]) -> dict:
    """0 to 100 by a judge that sees the image."""
    prompt = theirs("internal_eval/dc100_en_utils").EVALUATION_PROMPT_TEMPLATE_SIMPLE_V1
    messages = [{"role": "user", "content": prompt.format(caption=answers[0])}]
    return results(judge(messages, final_score, picture(doc)))


# ---- Video-DC: detailed descriptions of 499 videos


def video(doc: dict) -> list[str]:
    """Where lmms-eval unpacked the video of a row."""
    folder = Path(os.environ["HF_HOME"]).expanduser() / "videochatgpt/Test_Videos"
    files = [*folder.glob(f"{doc['video_name']}.*"), folder / f"{doc['video_name']}.mp4"]
    return [str(files[0])]


def video_score(doc: dict, answers: list[str]) -> dict:
    """0 to 5 by a judge that knows the true description; the blog prints the mean times 20.

    lmms-eval builds the prompt and posts it in one function, so that function runs with a `post`
    that only records the messages.
    """
    utils = theirs("video_detail_description/utils")
    recorded = {}

    def post(*_, json: dict, **__):
        recorded.update(json)
        body = {"model": "", "choices": [{"message": {"content": "not asked"}}]}
        return SimpleNamespace(raise_for_status=lambda: None, json=lambda: body)

    with lock:
        utils.requests = SimpleNamespace(post=post, exceptions=utils.requests.exceptions)
        utils.get_eval_generic(doc["question"], doc["answer"], answers[0], 64, retries=1)
    return results(judge(recorded["messages"], detail_score, max_new_tokens=64))


# ---- LLaVA-Bench in the wild


def wild_score(doc: dict, answers: list[str]) -> dict:
    """Two scores of 1 to 10, for GPT-4's answer and for ours, by a judge that reads a caption.

    As in `video_score`, lmms-eval's function runs only to record its prompt.
    """
    utils = theirs("llava-in-the-wild/utils")
    recorded = {}

    def pipeline(content: str, **_):
        recorded["content"] = content
        return SimpleNamespace(raw_output="", metadata={"scores": [0, 0]})

    with lock:
        utils._get_pipeline = lambda: pipeline
        utils.llava_process_results(doc, answers)
    system = "You are a helpful and precise assistant for checking the quality of the answer."
    messages = [
        {"role": "system", "content": system},
        {"role": "user", "content": recorded["content"]},
    ]
    return results(judge(messages, pair))


def pair(text: str) -> tuple[float, float] | None:
    """The two scores in the first line: of GPT-4's answer, and of ours."""
    first = text.strip().split("\n")[0].strip()
    match = re.fullmatch(r"(\d+(?:\.\d+)?)[\s,;]+(\d+(?:\.\d+)?)", first)
    if not match:
        return None
    scores = float(match[1]), float(match[2])
    return scores if all(1 <= score <= 10 for score in scores) else None


def relative(judgements: list[dict]) -> float | None:
    """100 times the sum of our scores over the sum of GPT-4's."""
    pairs = [judgement["points"] for judgement in judgements if judgement["points"] is not None]
    if not pairs:
        return None
    return 100 * sum(ours for _, ours in pairs) / sum(gpt4 for gpt4, _ in pairs)


# ---- MathVista without a judge: only a bare answer can be right


def math_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The blog's prompt: the question, its choices, how to answer."""
    settings = {"shot": 0, "shot_type": "format-prompt", "use_caption": False, "use_ocr": False}
    return theirs("mathvista/utils").mathvista_doc_to_text(doc, settings)


def math_picture(doc: dict) -> list[Image.Image]:
    """The image of a row."""
    return [doc["decoded_image"].convert("RGB")]


def bare(answer: str, doc: dict) -> str | None:
    """An answer that is nothing else than a choice, its letter, a number or a list; else None."""
    if doc["question_type"] == "multi_choice":
        choices = {choice: choice for choice in doc["choices"]}
        for letter, choice in zip("ABCDEFGHIJKLMNOP", doc["choices"], strict=False):
            spellings = (letter, f"({letter})", f"{letter}. {choice}", f"({letter}) {choice}")
            choices |= dict.fromkeys(spellings, choice)
        return choices.get(answer)
    if doc["answer_type"] in ("integer", "float"):
        number = re.fullmatch(r"-?\d[\d,]*(?:\.\d+)?", answer)
        return answer.replace(",", "") if number else None
    return answer if answer.startswith("[") else None


def math_score(doc: dict, answers: list[str]) -> dict:
    """Right or wrong as lmms-eval compares, and whether the answer was not bare."""
    answer = bare(answers[0].strip().rstrip("."), doc)
    if answer is None:
        return {"accuracy": 0.0, "not_bare": 1}
    evaluator = theirs("mathvista/utils").mathvista_evaluator
    kind = (doc["choices"], doc["question_type"], doc["answer_type"], doc["precision"])
    normal = evaluator.normalize_extracted_answer(answer, *kind)
    return {"accuracy": float(evaluator.safe_equal(normal, doc["answer"])), "not_bare": 0}


# ---- MMMU with the prompt of May 2024


def mmmu_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """lmms-eval's prompt, but with a single line break before how to answer."""
    letter = "Answer with the option letter from the given choices directly."
    word = "Answer the question using a single word or phrase."
    text = theirs("mmmu/utils").construct_prompt(doc, letter, word)
    return re.sub(rf"\n\n(?=({letter}|{word})$)", "\n", text)


def mmmu_picture(doc: dict) -> list[Image.Image]:
    """The images that a question names."""
    return theirs("mmmu/utils").mmmu_doc_to_visual(doc)


def mmmu_score(doc: dict, answers: list[str]) -> dict:
    """The answer as lmms-eval reads it."""
    return theirs("mmmu/utils").mmmu_process_results(doc, answers)


def mmmu_total(scored: list) -> float:
    """The share of right answers."""
    return theirs("mmmu/utils").mmmu_aggregate_results(scored)
