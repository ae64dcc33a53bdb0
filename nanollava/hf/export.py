"""Export: a run as a LlavaOnevision folder (hf.py), written only if plain transformers agrees."""

import os
from os.path import commonprefix
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from PIL import Image
from torch import nn

from nanollava.checkpoint import load
from nanollava.hf import llava_onevision as hf
from nanollava.prompts import PLACEHOLDER, Turn
from nanollava.sequence import pack


def reopen(folder: str | Path) -> tuple[nn.Module, Any]:
    """What plain transformers makes of a folder: its model in float32, and its processor."""
    kind = transformers.AutoModelForImageTextToText
    theirs = kind.from_pretrained(folder, dtype=torch.float32)
    return theirs, transformers.AutoProcessor.from_pretrained(folder)


@torch.no_grad()
def difference(model: Any, folder: str | Path) -> float:
    """The largest difference of a logit between a VLM and a folder in plain transformers, in
    float32, on a fixed image and question. Raises ValueError where the tokens differ already.
    """
    theirs, process = reopen(folder)
    R, text, draw = model.spec.tile, "What is it?", torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (3 * R // 2, 5 * R // 2, 3), dtype=torch.uint8, generator=draw)
    image = Image.fromarray(pixels.numpy())
    talk = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": text}]}]
    prompt = process.apply_chat_template(talk, add_generation_prompt=True)
    inputs = process(images=image, text=prompt, return_tensors="pt")
    turn = Turn("user", f"{PLACEHOLDER}\n{text}", 1)
    row = pack([model.writer()([turn], [image], answer=True)], R)
    ids = row.ids.index_fill(0, row.visual, theirs.config.image_token_id).tolist()
    found = inputs["input_ids"][0].tolist()
    same = f"{len(found)} tokens, the first {len(commonprefix([found, ids]))} as expected"
    hf.need(found == ids, f"{folder}: the prompt in transformers", same, f"{len(ids)} tokens")
    row = row.to(model.newline.device)
    hidden = model.read(model.embed(row), row.positions, list(row.lengths))
    mine = model.llm.lm_head(hidden).cpu()
    return (theirs(**inputs).logits[0, :, : mine.shape[1]] - mine).abs().max().item()


def export(run: Path, out: Path) -> None:
    """Write a run as a LlavaOnevision folder for plain transformers, if both give equal logits."""
    if out.exists() and (out.is_file() or any(out.iterdir())):
        raise ValueError(f"{out} is not empty: give another folder")
    model, above = load(run), out.absolute().parent
    above.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=above) as scratch:  # so that OUT is whole, or not there
        folder = Path(scratch, "out")
        hf.write(model, folder)
        apart = difference(model, folder)
        if not apart <= 1e-4:
            raise ValueError(f"transformers' logits differ by {apart:.1e}, limit 1e-4: no {out}")
        os.replace(folder, out)
    print(f"{out}: transformers' logits differ by {apart:.1e} at most")
