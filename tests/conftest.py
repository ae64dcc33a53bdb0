"""Tiny stand-ins that the tests share: one tokenizer, one random model, one recipe."""

import io
import os
import tarfile
from importlib.util import find_spec

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
# The second environment (parity.txt) has neither; requirements.txt has both.
NEED = {"test_demo.py": "gradio", "test_notebooks.py": "nbclient"}
collect_ignore = [name for name, library in NEED.items() if find_spec(library) is None]
TOKENIZER = ROOT / "recipes" / "nano" / "tokenizer"


def film(frames, width=64, height=48, kind="mp4"):
    """A video whose frame i is grey 20 i, as bytes."""
    import av
    import numpy as np

    with av.open(file := io.BytesIO(), "w", format=kind) as video:
        stream = video.add_stream("mpeg4", rate=8)
        stream.width, stream.height = width, height
        for i in range(frames):
            grey = np.full((height, width, 3), 20 * i % 256, np.uint8)
            video.mux(stream.encode(av.VideoFrame.from_ndarray(grey, "rgb24")))
        video.mux(stream.encode())
    return file.getvalue()


def tar(members: dict[str, bytes], mode: str = "w") -> bytes:
    """A tar of files."""
    with tarfile.open(fileobj=(out := io.BytesIO()), mode=mode) as box:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            box.addfile(info, io.BytesIO(content))
    return out.getvalue()


@pytest.fixture(scope="session")
def tokenizer():
    """The nano tokenizer: ChatML specials, nothing unknown."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(TOKENIZER)


def llm_folder(folder: Path, tokenizer, **changes) -> str:
    """A folder with the config of a tiny Qwen2 and the nano tokenizer; weights are random."""
    from transformers import Qwen2Config

    keys = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": True,
    }
    Qwen2Config(**keys | changes, architectures=["Qwen2ForCausalLM"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_llm(tmp_path_factory, tokenizer):
    return llm_folder(tmp_path_factory.mktemp("llm"), tokenizer)


@pytest.fixture(scope="session")
def tiny_recipe(tiny_llm):
    """The smallest whole model: R = 48 pixels, T = 36 tokens, LLM width 32, float32."""
    from nanollava.anyres import Visual
    from nanollava.recipe import Recipe

    return Recipe(
        encoder="nano_s",
        encoder_weights="random",
        llm=tiny_llm,
        llm_weights="random",
        visual=Visual(max_grid="3x3", max_visual_tokens="10T"),
        max_length=4096,
        precision="fp32",
        workers=0,
    )


@pytest.fixture(scope="session")
def tiny_model(tiny_recipe):
    """The same random model for every test; a test that trains or changes it makes its own."""
    from nanollava.model import VLM

    torch.manual_seed(0)
    return VLM(tiny_recipe).eval()
