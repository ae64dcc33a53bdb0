"""Stage 0: the tiny pretrained parts that stand in for the blog's CLIP and Qwen.

    composer recipes/nano_pretrain.yaml

The blog begins with parts that already see and speak; nobody can fetch such parts for 48-pixel
views and a 400-thousand-parameter LLM, so they are made here, from the nano world's training
split alone. Every crutch (dense labels, exercises, rasters) stays in this folder. Phases that
have finished are kept in `run` and are not repeated. Written, in half precision:
encoder_SIZE.safetensors, llm_SIZE/ (a transformers folder with its tokenizer), scores.json.
"""

import json
import platform
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import open_clip
import reading
import sight
import torch
import transformers
import vocabulary
import world
from safetensors.torch import save_file


def see(recipe: Any) -> dict:
    """Make and write the encoder; returns its entry in scores.json."""
    model, phases = sight.train(recipe.encoder[-1], Path(recipe.run), recipe.seed)
    weights = model.encoder.visual.half().state_dict()
    save_file({k: v.contiguous() for k, v in weights.items()}, recipe.encoder_weights)
    model.float()  # scored as it is shipped
    return {"phases": phases, "accuracy": sight.scores(model)}


def read(recipe: Any) -> dict:
    """Make and write the LLM; returns its entry in scores.json."""
    model, phases = reading.train(recipe.llm[-1], Path(recipe.run), recipe.seed)
    model.half().save_pretrained(recipe.llm)
    vocabulary.build().save_pretrained(recipe.llm)
    return {"phases": phases, "text_only": reading.ceilings(model.float())}


def main(recipe: Any) -> None:
    """Write the encoder to `encoder_weights` and the LLM to `llm`, the places a recipe names, in
    two processes at once. Their sizes are the ends of the names: nano_m, .../llm_m.
    """
    torch.set_num_threads(1)
    folder = Path(recipe.llm).parent
    folder.mkdir(parents=True, exist_ok=True)
    with ProcessPoolExecutor(2, get_context("fork")) as pool:
        parts = {Path(recipe.encoder_weights).stem: pool.submit(see, recipe)}
        parts[Path(recipe.llm).name] = pool.submit(read, recipe)
    note = {
        "world": world.VERSION,
        "seed": recipe.seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "open_clip": open_clip.__version__,
    }
    file = folder / "scores.json"
    scores = json.loads(file.read_text()) if file.exists() else {}
    scores |= {part: done.result() | note for part, done in parts.items()}
    file.write_text(json.dumps(scores, indent=1) + "\n")
