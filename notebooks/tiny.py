"""A SigLIP of a quarter of a million parameters, so that a nano run can be exported.

    python notebooks/tiny.py train RECIPE     # any command of `python -m nanollava`, which knows it

LlavaOnevision holds towers of SigLIP or CLIP; nano's own encoders are neither. This one has nano's
tiles (R = 48, T = 36) and no pretraining: it shows the way to a folder that plain transformers
opens, and reads nothing.
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import timm
from open_clip.factory import add_model_config
from timm.models.vision_transformer import VisionTransformer

from nanollava.encoder import ENCODERS, EncoderSpec

NAME, TILE, PATCH, WIDTH, BLOCKS = "vit_nano_siglip", 48, 8, 96, 2
TEXT = {"context_length": 8, "vocab_size": 16, "width": 16, "heads": 1, "layers": 1}  # cut away


def vit_nano_siglip(pretrained: bool = False, **keys) -> VisionTransformer:
    """The tower as timm builds it: one block more than is kept, as SigLIP is published."""
    return VisionTransformer(
        img_size=TILE,
        patch_size=PATCH,
        embed_dim=WIDTH,
        depth=BLOCKS + 1,
        num_heads=6,
        class_token=False,
        **{k: v for k, v in keys.items() if k in ("num_classes", "global_pool")},
    )


__all__ = [NAME]
if NAME not in timm.list_models():
    timm.models.register_model(vit_nano_siglip)
    vision = {"image_size": TILE, "timm_model_name": NAME, "timm_pool": "map", "timm_proj": "none"}
    with TemporaryDirectory() as folder:
        file = Path(folder, f"{NAME}.json")
        file.write_text(
            json.dumps(
                {"embed_dim": 16, "custom_text": True, "text_cfg": TEXT, "vision_cfg": vision}
            )
        )
        add_model_config(file)
ENCODERS["tiny_siglip"] = EncoderSpec(TILE, PATCH, WIDTH, BLOCKS, tanh=True, open_clip=NAME)

if __name__ == "__main__":
    from nanollava.__main__ import run

    run()
