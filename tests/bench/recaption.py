"""Re-captioning against transformers' generate on batches: the same documents, the same captions.

    python tests/bench/recaption.py

SigLIP and Qwen2 at a quarter of their widths, random weights, mosaic budget (9+1)T; batches of
eight images, of mixed sizes or all of one size; one thread, CPU time, in turns. The peer pads a
batch to its longest prompt and to its most tiles.
"""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from PIL import Image

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
import peer  # noqa: E402
from contest import Row, race, ratio, told  # noqa: E402

from nanollava.extras.recaption import PROMPT  # noqa: E402
from nanollava.generate import Assistant  # noqa: E402
from nanollava.prompts import Turn  # noqa: E402
from nanollava.sequence import Document  # noqa: E402

MAX_NEW_TOKENS = 48  # real captions are longer; with fewer the prompts take nearly all the time
MIXED = [
    (320, 240),
    (640, 480),
    (480, 800),
    (1024, 768),
    (900, 300),
    (1200, 1600),
    (768, 768),
    (600, 2000),
]
BATCHES = {"mixed sizes": MIXED, "1024 x 768": [(1024, 768)] * 8}


def main() -> list[Row]:
    """A row for each batch."""
    visual = replace(peer.MOSAIC, max_grid="6x6", max_visual_tokens="(9+1)T")
    with tempfile.TemporaryDirectory() as folder:
        model = peer.ours(Path(folder), peer.QUARTER, visual)
    other = peer.peer_of(model)
    turns = [Turn("user", f"<image>\n{PROMPT}", 1)]
    writer = model.writer()
    assistant = Assistant(model)
    rows = []
    for name, sizes in BATCHES.items():
        images = [Image.effect_noise(size, 90).convert("RGB") for size in sizes]
        documents = [writer(turns, [image], answer=True) for image in images]
        rows.append(compare(name, assistant, other, documents))
    return rows


def compare(title: str, assistant: Assistant, other, documents: list[Document]) -> Row:
    """One batch: both write equal captions, and the times of both."""
    model = assistant.model
    prompts = peer.batch(model, documents, left=True)

    def theirs():
        written = peer.write(other, prompts, MAX_NEW_TOKENS)
        return model.tokenizer.batch_decode(written, skip_special_tokens=True)

    def ours():
        return [text for text, _ in assistant.answer(documents, MAX_NEW_TOKENS)]

    times = race({"peer": theirs, "ours": ours}, rounds=1)
    lengths = [len(d.ids) for d in documents]
    note = f"prompts of {min(lengths)} to {max(lengths)} positions, {told(times)}"
    return Row(
        f"re-captions, eight images, {title}", ratio(times, "peer", "ours"), "x", 1.2, note=note
    )


if __name__ == "__main__":
    print(*main(), sep="\n")
