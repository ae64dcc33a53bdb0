"""Tasks of lmms-eval as the blog ran them in May 2024, where lmms-eval 0.7.3 differs, and judged
ones on data that can be had. Prompts of judges and parsers are lmms-eval's own, read from it.

    python -m lmms_eval --model nanollava --model_args pretrained=RUN \\
        --include_path recipes/eval --tasks video_dc_2024
"""

import os
import re
from functools import cache
from pathlib import Path
from threading import RLock
from types import ModuleType, SimpleNamespace

import lmms_eval.tasks
from PIL import Image

from nanollava.benchmarks import judge
from nanollava.sources import import_file

mean, total = judge.mean, sum
lock = RLock()  # lmms-eval scores in threads; below, its files are imported and parts replaced
os.environ.setdefault("HF_HOME", str(Path("~/.cache/huggingface").expanduser()))  # as it expects


def theirs(name: str) -> ModuleType:
    """A file of lmms-eval's tasks."""
    with lock:
        return imported(name)


@cache
def imported(name: str) -> ModuleType:
    """A file of lmms-eval's tasks; some of their folders have no name that can be imported, and
    some make a judge when they are, which asks for a key.
    """
    key = os.environ.get("OPENAI_API_KEY")
    os.environ["OPENAI_API_KEY"] = key or "none"
    module = import_file(f"{Path(lmms_eval.tasks.__file__).parent / name}.py")
    if not key:
        del os.environ["OPENAI_API_KEY"]
    return module


# ---- images described in detail, on a folder of one's own: the blog's images were never released


def picture(doc: dict) -> list[Image.Image]:
    """The image of a folder's row."""
    return [doc["image"].convert("RGB")]


def question_en(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The blog's prompt of its re-captioned data."""
    return "Please generate detailed descriptions of the given image."


def question_cn(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """Ours: the blog prints no Chinese prompt."""
    return "请详细描述这张图片。"


def image_score(doc: dict, results: list[str]) -> dict:
    """0 to 100 by a judge that sees the image."""
    prompt = theirs("internal_eval/dc100_en_utils").EVALUATION_PROMPT_TEMPLATE_SIMPLE_V1
    asked = [{"role": "user", "content": prompt.format(caption=results[0])}]
    return judge.results(judge.judge(asked, judge.final_score, picture(doc)))


# ---- 499 videos described in detail


def video(doc: dict) -> list[str]:
    """Where lmms-eval unpacked the video of a row."""
    folder = Path(os.environ["HF_HOME"]).expanduser() / "videochatgpt/Test_Videos"
    return [str(next(folder.glob(f"{doc['video_name']}.*"), folder / f"{doc['video_name']}.mp4"))]


def video_score(doc: dict, results: list[str]) -> dict:
    """0 to 5 by a judge that knows the true description; the blog prints it times 20."""
    utils = theirs("video_detail_description/utils")
    sent = {}

    def post(*_, json: dict, **__):
        sent.update(json)
        body = {"model": "", "choices": [{"message": {"content": "not asked"}}]}
        return SimpleNamespace(raise_for_status=lambda: None, json=lambda: body)

    with lock:
        utils.requests = SimpleNamespace(post=post, exceptions=utils.requests.exceptions)
        utils.get_eval_generic(doc["question"], doc["answer"], results[0], 64, retries=1)
    found = judge.judge(sent["messages"], judge.detail_score, room=64)
    return judge.results(found)


# ---- LLaVA-Bench in the wild


def wild_score(doc: dict, results: list[str]) -> dict:
    """Two scores of 1 to 10, of GPT-4's answer and of ours, by a judge that reads a caption."""
    utils = theirs("llava-in-the-wild/utils")
    sent = {}

    def pipeline(content: str, **_):
        sent["content"] = content
        return SimpleNamespace(raw_output="", metadata={"scores": [0, 0]})

    with lock:
        utils._get_pipeline = lambda: pipeline
        utils.llava_process_results(doc, results)
    system = "You are a helpful and precise assistant for checking the quality of the answer."
    asked = [{"role": "system", "content": system}, {"role": "user", "content": sent["content"]}]
    return judge.results(judge.judge(asked, pair))


def pair(text: str) -> tuple[float, float] | None:
    """The first line's two scores, of GPT-4's answer and of ours."""
    found = re.fullmatch(
        r"(\d+(?:\.\d+)?)[\s,;]+(\d+(?:\.\d+)?)", text.strip().split("\n")[0].strip()
    )
    scores = found and (float(found[1]), float(found[2]))
    return scores if scores and all(1 <= x <= 10 for x in scores) else None


def relative(found: list[dict]) -> float | None:
    """100 times our mean over GPT-4's."""
    pairs = [row["points"] for row in found if row["points"] is not None]
    return 100 * sum(x for _, x in pairs) / sum(x for x, _ in pairs) if pairs else None


# ---- MathVista without a judge: what is no bare answer counts as wrong


def math_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """The blog's prompt: the question, its choices, how to answer."""
    keys = {"shot": 0, "shot_type": "format-prompt", "use_caption": False, "use_ocr": False}
    return theirs("mathvista/utils").mathvista_doc_to_text(doc, keys)


def math_picture(doc: dict) -> list[Image.Image]:
    """The image of a row."""
    return [doc["decoded_image"].convert("RGB")]


def bare(said: str, doc: dict) -> str | None:
    """The answer in a response that is nothing else: a choice, its letter, a number, a list."""
    if doc["question_type"] == "multi_choice":
        found = {choice: choice for choice in doc["choices"]}
        for a, choice in zip("ABCDEFGHIJKLMNOP", doc["choices"], strict=False):
            found |= dict.fromkeys((a, f"({a})", f"{a}. {choice}", f"({a}) {choice}"), choice)
        return found.get(said)
    number = r"-?\d[\d,]*(?:\.\d+)?"
    if doc["answer_type"] in ("integer", "float"):
        return said.replace(",", "") if re.fullmatch(number, said) else None
    return said if said.startswith("[") else None


def math_score(doc: dict, results: list[str]) -> dict:
    """Right or wrong as lmms-eval compares, and whether there was no bare answer."""
    evaluator = theirs("mathvista/utils").mathvista_evaluator
    keys = (doc["choices"], doc["question_type"], doc["answer_type"], doc["precision"])
    found = bare(results[0].strip().rstrip("."), doc)
    told = found is not None and evaluator.normalize_extracted_answer(found, *keys)
    right = found is not None and evaluator.safe_equal(told, doc["answer"])
    return {"accuracy": float(right), "not_bare": int(found is None)}


# ---- MMMU in the words of May 2024


def mmmu_text(doc: dict, lmms_eval_specific_kwargs: dict | None = None) -> str:
    """A single line break before how to answer."""
    how = "Answer with the option letter from the given choices directly."
    word = "Answer the question using a single word or phrase."
    text = theirs("mmmu/utils").construct_prompt(doc, how, word)
    return re.sub(rf"\n\n(?=({how}|{word})$)", "\n", text)


def mmmu_picture(doc: dict) -> list[Image.Image]:
    """The images that a question names."""
    return theirs("mmmu/utils").mmmu_doc_to_visual(doc)


def mmmu_score(doc: dict, results: list[str]) -> dict:
    """As lmms-eval reads answers."""
    return theirs("mmmu/utils").mmmu_process_results(doc, results)


def mmmu_total(found: list) -> float:
    """The share that is right."""
    return theirs("mmmu/utils").mmmu_aggregate_results(found)
