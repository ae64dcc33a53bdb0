"""What to type after a training: a question about an image of the run's first task."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nanollava.evaluate import questions
from nanollava.metrics import METRICS
from nanollava.prompts import PLACEHOLDER


def save_sample(assistant: Any, run: str | Path) -> str:
    """Write an image of the first task, one that is answered right if there is one soon, into the
    run folder; returns the command that asks about it.
    """
    recipe, file = assistant.model.recipe, Path(run) / "sample.png"
    task = next(task for task in recipe.tasks.values() if task)
    score, total = METRICS[task.metric]
    told = f"python -m nanollava chat {run} IMAGE QUESTION"
    few = replace(task, samples=min(20, task.samples or 20))
    for turns, images, reference in questions(few, recipe.seed):
        if images:
            question = turns[-1].text.replace(PLACEHOLDER, "").strip()
            answer = assistant.chat(images[0], question, max_new_tokens=task.max_new_tokens)
            file.write_bytes(images[0])
            told = f'python -m nanollava chat {run} {file} "{question}"  # true: {reference}'
            if total(np.array([score(answer, reference)], dtype=float)) == 1:
                break
    return told
