"""Stage 0: the tiny pretrained parts that stand in for the blog's CLIP and Qwen.

    composer recipes/nano_pretrain.yaml
    python recipes/nano/pretrain.py --encoder m --llm m --out recipes/nano/weights

The blog begins with parts that already see and speak; nobody can fetch such parts for 48-pixel
views and a 400-thousand-parameter LLM, so they are made here, from the nano world's training
split alone. Every crutch (dense labels, exercises, rasters) stays in this folder. Phases that
have finished are kept in `work` and are not repeated. Written: encoder_SIZE.safetensors,
llm_SIZE/ (a transformers folder with its tokenizer), scores.json.
"""

import argparse
import json
import os
import platform
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


def main(recipe: Any) -> None:
    """Write the encoder to `encoder_weights` and the LLM to `llm`, the places a recipe names.

    Their sizes are the ends of the names: nano_m, .../llm_m. An empty name leaves that part out.
    """
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    work, seed, found = Path(recipe.run), recipe.seed, {}
    if recipe.encoder:
        out = Path(recipe.encoder_weights)
        model, phases = sight.train(recipe.encoder[-1], work, seed=seed)
        out.parent.mkdir(parents=True, exist_ok=True)
        weights = model.encoder.visual.half().state_dict()
        save_file({k: v.contiguous() for k, v in weights.items()}, out)
        model.encoder.visual.half().float()  # scored as shipped
        found[out.stem] = {"phases": phases, "accuracy": sight.scores(model)}
    if recipe.llm:
        out = Path(recipe.llm)
        model, phases = reading.train(recipe.llm[-1], work, seed=seed)
        found[out.stem] = {"phases": phases, "text_only": reading.ceilings(model.half().float())}
        model.half().save_pretrained(out)
        vocabulary.build().save_pretrained(out)
    note = {
        "world": world.VERSION,
        "seed": seed,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "open_clip": open_clip.__version__,
    }
    path = out.parent / "scores.json"
    scores = json.loads(path.read_text()) if path.exists() else {}
    scores |= {part: record | note for part, record in found.items()}
    path.write_text(json.dumps(scores, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Make the nano world's pretrained parts.")
    parser.add_argument("--encoder", default="", help="s, m or l; nothing for none")
    parser.add_argument("--llm", default="", help="s, m or l; nothing for none")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "weights")
    parser.add_argument("--run", default="runs/nano_pretrain", help="where phases are kept")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    main(
        argparse.Namespace(
            run=asked.run,
            seed=asked.seed,
            encoder=asked.encoder and f"nano_{asked.encoder}",
            encoder_weights=asked.out / f"encoder_{asked.encoder}.safetensors",
            llm=asked.llm and str(asked.out / f"llm_{asked.llm}"),
        )
    )
