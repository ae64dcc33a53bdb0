"""Export a run as a LlavaOnevision folder, and only if plain transformers gives the same logits."""

import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import transformers
from PIL import Image
from torch import nn

from nanollava.checkpoint import load
from nanollava.hf import llava_onevision as hf
from nanollava.model import VLM
from nanollava.prompts import PLACEHOLDER, Turn
from nanollava.sequence import pack


def reopen(folder: str | Path) -> tuple[nn.Module, transformers.ProcessorMixin]:
    """What plain transformers makes of a folder: its model in float32, and its processor."""
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    return model, transformers.AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def difference(model: VLM, folder: str | Path) -> float:
    """The largest difference of a logit between a VLM and a folder in plain transformers.

    Both read the same question about the same image, in float32. Raises ValueError if their tokens
    already differ.
    """
    theirs, processor = reopen(folder)
    R, text = model.spec.tile, "What is it?"
    noise = torch.Generator().manual_seed(0)
    size = (3 * R // 2, 5 * R // 2, 3)
    pixels = torch.randint(0, 256, size, dtype=torch.uint8, generator=noise)
    image = Image.fromarray(pixels.numpy())  # (H, W, 3); wider than a tile, so that it has a grid

    # 1. The question as transformers writes it, and as we do.
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    turn = Turn("user", f"{PLACEHOLDER}\n{text}", images=1)
    packed = pack([model.writer()([turn], [image], answer=True)], R)

    # 2. The ids must be equal. Theirs are <image> wherever ours are visual tokens.
    given = inputs["input_ids"][0].tolist()
    expected = packed.ids.index_fill(0, packed.visual, theirs.config.image_token_id).tolist()
    if given != expected:
        same = len(os.path.commonprefix([given, expected]))
        problem = f"{folder}: the prompt is {len(given)} tokens, the first {same} as expected"
        raise ValueError(f"{problem}; expected {len(expected)} tokens. Export to a new folder")

    # 3. The logits may differ by rounding.
    packed = packed.to(model.newline.device)
    hidden = model.read(model.embed(packed), packed.positions, list(packed.lengths))  # (S, D)
    ours = model.llm.lm_head(hidden).cpu()  # (S, vocabulary)
    logits = theirs(**inputs).logits[0, :, : ours.shape[1]]  # without the words that export adds
    return (logits - ours).abs().max().item()


def export(run: Path, out: Path) -> None:
    """Write a run as a LlavaOnevision folder for plain transformers, if both give equal logits."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty. Give a new or an empty folder")
    model, parent = load(run), out.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=parent) as scratch:  # `out` appears complete or not at all
        folder = Path(scratch, "out")
        hf.write(model, folder)
        largest = difference(model, folder)
        if not largest <= 1e-4:  # or nan
            problem = f"transformers' logits differ by {largest:.1e}, limit 1e-4: no {out} written"
            raise ValueError(f"{problem}. Try the version of transformers in requirements.txt")
        os.replace(folder, out)
    print(f"{out}: transformers' logits differ by {largest:.1e} at most")
