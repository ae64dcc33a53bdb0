"""nanollava: the ablations of LLaVA-NeXT's blog post "What Else Influences Visual Instruction
Tuning Beyond Data?", as a compact package to read and to run.

Read the modules in the order in which data flows through them. From pixels to the loss: anyres,
encoder, projector, pooling, prompts, sequence, llm, model. Around them: recipe, sources, data and
train to train a model, generate to talk to it, evaluate and metrics to score it.

Words: a grid is a columns x b rows of tiles. A view is a tile or the base view, which is the whole
image at the size of a tile. An encoder makes T tokens of each view. An image takes L tokens in all,
and the budget tau is the most that it may take.
"""


def main(recipe: str) -> None:
    """Run a recipe; its first line calls this under `composer recipes/nano.yaml key=value ...`."""
    import os
    import sys

    if os.environ.get("RANK", "0") == "0":  # one process speaks for all
        print("nanollava: loading torch and Composer, about ten seconds ...", flush=True)
    from nanollava.__main__ import run

    run(["train", recipe, *sys.argv[1:]])


def load(run: str, device: str = ""):
    """A run folder -> an assistant: `nanollava.load("runs/nano").chat(image, question)`."""
    from nanollava.generate import load

    return load(run, device)
