"""nanollava: the ablations of LLaVA-NeXT's blog post "What Else Influences Visual Instruction
Tuning Beyond Data?", in about 2,200 readable lines.

Read the modules in the data's order: anyres, encoder, projector, pooling, prompts, sequence, llm,
model, then train, generate and evaluate. A grid is a columns x b rows of tiles; a view is a tile or
the base view; T tokens per view, L per image, tau the budget.
"""


def main(recipe: str) -> None:
    """What a recipe calls when it is launched: `composer recipes/nano.yaml key=value ...`."""
    import os
    import sys

    if os.environ.get("RANK", "0") == "0":
        print("nanollava: loading torch and Composer, about ten seconds ...", flush=True)
    from nanollava.__main__ import run

    run(["train", recipe, *sys.argv[1:]])


def load(run: str, device: str = ""):
    """A run folder -> an assistant: `nanollava.load("runs/nano").chat(image, question)`."""
    from nanollava.generate import load

    return load(run, device)
