"""One training step at real widths: SO400M and Qwen1.5-0.5B with random weights, one photograph.

    python tests/bench/real.py            # about three minutes and 20 GB on two CPU cores

Stage 1 (projector only), then stage 2 (everything, activations recomputed), each in a process of
its own: forward, backward, AdamW's step in float32. Prints the seconds, and the peak of memory next
to what `plan` expects.
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

sys.path.insert(0, str(Path(__file__).parent.parent))
import peer  # noqa: E402

from nanollava.anyres import open_image  # noqa: E402
from nanollava.extras.plan import memory  # noqa: E402
from nanollava.prompts import Turn  # noqa: E402
from nanollava.recipe import Stage  # noqa: E402
from nanollava.sequence import pack  # noqa: E402

PHOTO = Path(matplotlib.get_data_path(), "sample_data/grace_hopper.jpg")  # 512 x 600, NASA
ANSWER = "A woman in uniform stands before a flag. " * 8
STAGES = {
    "stage1": Stage(train="projector", anyres=False),
    "stage2": Stage(train="full", checkpoint_activations=True),
}


def step(name: str) -> None:
    """Take one step, and print one line about it."""
    torch.manual_seed(0)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    stage = STAGES[name]
    with tempfile.TemporaryDirectory() as folder:
        model = peer.real(Path(folder), precision="fp32")
    model.set_trainable(stage.train)
    model.checkpoint_activations(stage.checkpoint_activations)
    writer = model.writer(model.recipe.visual_of(stage))
    turns = [Turn("user", "<image>\nWhat is this?", 1), Turn("assistant", ANSWER)]
    document = writer(turns, [open_image(PHOTO)])
    optimizer = torch.optim.AdamW(model.groups(2e-5, 2e-6, 2e-5, 0.0), fused=True)
    begin = time.perf_counter()
    loss = model(pack([document], model.spec.tile)).mean()
    loss.backward()
    optimizer.step()
    seconds = time.perf_counter() - begin
    trained = [p for p in model.parameters() if p.requires_grad]
    assert loss.isfinite() and all(p.grad is not None for p in trained)
    stage = replace(stage, microbatch_tokens=1, batch_size=1)
    need = memory(model.recipe, stage, model, peer.averages([document]), 1, "fp32")
    planned = sum(need.values()) / 1e9
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / 1e9
    print(
        f"{name}: {len(document.views)} views, {len(document.ids)} positions, "
        f"{document.learned} supervised; loss {loss:.2f}; {seconds:.0f} s; "
        f"peak {peak:.1f} GB, plan {planned:.1f} GB"
    )


if __name__ == "__main__":
    for name in sys.argv[1:] or STAGES:
        if sys.argv[1:]:
            step(name)
        else:
            subprocess.run([sys.executable, __file__, name], check=True)
