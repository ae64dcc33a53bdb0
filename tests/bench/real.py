"""One training step at real widths: SO400M and Qwen1.5-0.5B with random weights, one photograph.

    python tests/bench/real.py            # about three minutes and 20 GB on two CPU cores

Stage 1 (projector only), then stage 2 (everything, activations recomputed), each in a process of
its own: forward, backward, AdamW's step in float32; seconds and the peak of memory beside `plan`.
"""

import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import matplotlib
import torch
from transformers import AutoTokenizer

from nanollava.anyres import open_image
from nanollava.llm import config_of
from nanollava.model import VLM
from nanollava.plan import memory
from nanollava.prompts import Turn
from nanollava.recipe import Stage, read_recipe
from nanollava.sequence import pack

ROOT = Path(__file__).parents[2]
PHOTO = Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")  # 512 x 600, NASA
ANSWER = "A woman in uniform stands before a flag. " * 8
STAGES = {
    "stage1": Stage(train="projector", anyres=False),
    "stage2": Stage(train="full", checkpoint_activations=True),
}


def model_of(folder: str) -> VLM:
    """The real parts with random weights; nano's tokenizer stands in for Qwen's."""
    config_of("Qwen/Qwen1.5-0.5B-Chat", random=True).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "recipes/nano/tokenizer").save_pretrained(folder)
    recipe = read_recipe(ROOT / "recipes/qwen05b.yaml", llm=folder, precision="fp32")
    return VLM(recipe, "random")


def step(name: str) -> None:
    """One step, told in one line."""
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stage = STAGES[name]
    with tempfile.TemporaryDirectory() as folder:
        model = model_of(folder)
    model.set_trainable(stage.train)
    model.checkpoint_activations(stage.checkpoint_activations)
    keys = model.recipe.visual
    writer = model.writer(keys if stage.anyres else replace(keys, max_grid="base"))
    turns = [Turn("user", "<image>\nWhat is this?", 1), Turn("assistant", ANSWER)]
    document = writer(turns, [open_image(PHOTO)])
    optimizer = torch.optim.AdamW(model.groups(2e-5, 2e-6, 2e-5, 0.0), fused=True)
    begin = time.perf_counter()
    loss = model(pack([document], model.row.tile)).mean()
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - begin
    trained = [p for p in model.parameters() if p.requires_grad]
    assert loss.isfinite() and all(p.grad is not None for p in trained)
    mean = {"positions": len(document.ids), "views": len(document.views),
            "learned": document.learned, "longest": len(document.ids)}  # fmt: skip
    stage = replace(stage, microbatch_tokens=1, batch_size=1)
    need = sum(memory(model.recipe, stage, model, mean, 1, "fp32").values()) / 1e9
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9
    print(f"{name}: {len(document.views)} views, {len(document.ids)} positions, "
          f"{document.learned} supervised; loss {loss:.2f}; {seconds:.0f} s; "
          f"peak {peak:.1f} GB, plan {need:.1f} GB")  # fmt: skip


if __name__ == "__main__":
    for name in sys.argv[1:] or STAGES:
        if sys.argv[1:]:
            step(name)
        else:
            subprocess.run([sys.executable, __file__, name], check=True)
