"""Real images: any size, mode and damage, from the file's bytes to a finite loss."""

import io
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import film, llm_folder
from matplotlib.cbook import get_sample_data
from open_clip.transformer import VisionTransformer
from PIL import Image

import nanollava.anyres
import nanollava.model
from nanollava.anyres import Visual, open_image
from nanollava.encoder import Encoder, EncoderSpec
from nanollava.extras.video import open_video
from nanollava.model import VLM
from nanollava.prompts import Turn
from nanollava.sequence import pack

TURNS = (Turn("user", "<image>\nwhat?", 1), Turn("assistant", "a frame 305"))
ORIENTATION = 0x0112


def noise(W, H, channels=3, seed=0):
    shape = (H, W, channels) if channels > 1 else (H, W)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def encoded(image, kind="PNG", **keys):
    image.save(file := io.BytesIO(), kind, **keys)
    return file.getvalue()


def photo():
    with get_sample_data("grace_hopper.jpg", asfileobj=True) as file:
        return file.read()


def gradient(W, H):
    x = np.linspace(0, 255, W, dtype=np.uint8)[None].repeat(H, 0)
    y = np.linspace(0, 255, H, dtype=np.uint8)[:, None].repeat(W, 1)
    return Image.fromarray(np.stack([x, y, x], -1))


def rotated():
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the camera was held upright: turn it 90 degrees clockwise
    return encoded(gradient(60, 20), "JPEG", exif=exif)


def animated():
    red, blue = (Image.new("RGB", (50, 30), c) for c in ("red", "blue"))
    return encoded(red, "GIF", save_all=True, append_images=[blue])


def palette():
    image = gradient(90, 40).quantize(16)
    return encoded(image, "PNG", transparency=3)


MADE = {
    "photograph": photo,
    "1x5000": lambda: encoded(Image.fromarray(noise(1, 5000))),
    "5000x1": lambda: encoded(Image.fromarray(noise(5000, 1))),
    "6000x4000": lambda: encoded(gradient(6000, 4000), "JPEG"),
    "1x1": lambda: encoded(Image.new("RGB", (1, 1), "white")),
    "RGBA": lambda: encoded(Image.fromarray(noise(70, 40, 4), "RGBA")),
    "CMYK": lambda: encoded(Image.fromarray(noise(70, 40, 4), "CMYK"), "JPEG"),
    "grey": lambda: encoded(Image.fromarray(noise(70, 40, 1))),
    "grey and alpha": lambda: encoded(Image.fromarray(noise(70, 40, 2), "LA")),
    "one bit": lambda: encoded(Image.fromarray(noise(70, 40, 1)).convert("1")),
    "16 bit": lambda: encoded(Image.fromarray(noise(70, 40, 1).astype(np.uint16) * 257)),
    "rotated": rotated,
    "animated": animated,
    "palette": palette,
}


@pytest.mark.parametrize("name", MADE)
def test_any_image_gives_a_finite_loss_and_finite_gradients(tiny_model, name):
    """Bytes -> picture -> views -> encoder -> one packed row -> loss -> gradients."""
    image = open_image(MADE[name]())
    assert image.mode == "RGB"
    tiny_model.zero_grad()
    for visual in (
        Visual("3x3", max_visual_tokens="4T"),
        Visual("3x3", max_visual_tokens="4T", budget="mosaic"),
    ):
        document = tiny_model.writer(visual)(TURNS, [image], name=name)
        losses = tiny_model(pack([document], 48))
        assert len(losses) == document.learned and losses.isfinite().all()
        losses.mean().backward()
    grads = {n: p.grad for n, p in tiny_model.named_parameters()}
    assert all(g is not None and g.isfinite().all() for g in grads.values())
    assert all(grads[n].any() for n in ("newline", "projector.0.weight"))
    tiny_model.zero_grad()


# ---- what each file shows


def test_exif_is_turned_upright():
    """60x20 turned clockwise: the left edge comes to the top."""
    image = open_image(rotated())
    expected = gradient(60, 20).transpose(Image.Transpose.ROTATE_270)
    assert image.size == (20, 60)
    error = np.abs(np.asarray(image).astype(int) - np.asarray(expected).astype(int))
    assert error.mean() < 8, "JPEG's own loss, no more"


def test_16_bit_keeps_its_brightness():
    """65535 is white and 0 black; the mode is not cut at 255."""
    for dtype, mode in ((np.uint16, "I;16"), (np.int32, "I")):
        values = np.array([[0, 257, 32768, 65535]] * 2, dtype)
        image = Image.fromarray(values)
        assert image.mode == mode
        found = np.asarray(open_image(encoded(image, "PNG" if mode == "I;16" else "TIFF")))
        assert found[0, :, 0].tolist() == [0, 1, 127, 255]
        assert (found[..., 0] == found[..., 2]).all()
    for value in (np.nan, 1e12):
        with pytest.raises(ValueError, match="unreadable image: a pixel is NaN or above"):
            open_image(Image.fromarray(np.full((2, 2), value, np.float32)))
    small = Image.fromarray(np.array([[0, 100, 255]], np.int32))
    found = np.asarray(open_image(encoded(small, "TIFF")))
    assert found[0, :, 0].tolist() == [0, 100, 255], "8-bit values in a wide mode stay"


def test_first_frame_palette_and_ink():
    frame = np.asarray(open_image(animated()))
    assert frame[..., 0].min() > 250 and frame[..., 1:].max() < 9, "the first frame is red"
    shown = np.asarray(open_image(palette())).astype(int)
    assert np.abs(shown - np.asarray(gradient(90, 40)).astype(int)).mean() < 40
    white = open_image(encoded(Image.new("CMYK", (8, 8), (0, 0, 0, 0)), "JPEG"))
    assert white.getpixel((3, 3)) == (255, 255, 255), "no ink is white"


def test_bytes_and_files_are_read_alike(tmp_path):
    data = photo()
    (tmp_path / "a.jpg").write_bytes(data)
    pictures = [open_image(x) for x in (data, str(tmp_path / "a.jpg"), tmp_path / "a.jpg")]
    assert pictures[0].size == (512, 600)
    assert pictures[0].tobytes() == pictures[1].tobytes() == pictures[2].tobytes()


# ---- what cannot be read


def test_unreadable_images_are_errors(tmp_path):
    cut = photo()[:-20_000]
    svg = b"<svg xmlns='http://www.w3.org/2000/svg'></svg>"
    for data in (cut, b"", b"no image", svg, photo()[:100], str(tmp_path / "none.png")):
        with pytest.raises(ValueError, match="unreadable image: "):
            open_image(data)
    small = encoded(Image.new("RGB", (50, 40)))
    with pytest.raises(ValueError, match="unreadable image: 50x40 pixels, limit 1,999"):
        open_image(small, 1999)
    assert open_image(small, 2000).size == (50, 40)
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nshowpage"
    with pytest.raises(ValueError, match="unreadable image: none of PNG, JPEG"):
        open_image(postscript)  # Pillow would start another program for it


def test_frames_of_a_video_lie_evenly_from_the_first_to_the_last():
    for wanted, found in ((4, (0, 3, 6, 10)), (1, (0,)), (20, range(11))):
        frames = open_video(film(11), wanted)
        greys = np.array([np.asarray(frame).mean() for frame in frames])
        assert len(greys) == len(found) and np.abs(greys - 20 * np.array(found)).max() < 4
    assert len(open_video(film(5, kind="avi"), 4)) == 4


def test_unreadable_videos_are_errors(tmp_path):
    whole, playlist = film(5), b"ffconcat version 1.0\nfile other.mp4\n"
    for data in (b"", b"no video", whole[:200], playlist, photo(), str(tmp_path / "none.mp4")):
        with pytest.raises(ValueError, match="unreadable video: "):
            open_video(data, 4)
    with pytest.raises(ValueError, match="unreadable video: no decoder for its pictures"):
        open_video(whole.replace(b"mp4v", b"none").replace(b"esds", b"none"), 4)
    with pytest.raises(ValueError, match="5 frames of 64x48 pixels, limit 3,071 each"):
        open_video(whole, 4, 3071)
    assert len(open_video(whole, 4, 3072)) == 4
    with pytest.raises(ValueError, match="101 frames of 64x48 pixels, limit 3,072 each"):
        open_video(film(101), 4, 3072)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "GIF", "WEBP", "BMP", "PPM"])
def test_damaged_files_raise_only_value_error(kind):
    """150 files cut anywhere or with bytes changed: a picture or a ValueError, nothing else."""
    rng, whole = random.Random(0), encoded(Image.fromarray(noise(40, 50)), kind)
    for i in range(150):
        data = bytearray(whole[: rng.randrange(len(whole))] if i % 3 == 0 else whole)
        for _ in range(rng.randint(1, 5) if i % 3 else 0):
            data[rng.randrange(len(data) if i % 3 == 1 else 100)] = rng.randrange(256)
        try:
            assert open_image(bytes(data)).mode == "RGB"
        except ValueError as error:
            assert str(error).startswith("unreadable image: ")


# ---- the real widths


def test_one_step_at_the_real_widths(monkeypatch, tmp_path, tiny_recipe, tokenizer):
    """SO400M's tile and width, Qwen1.5-0.5B's width, few layers: one step lowers the loss."""
    row = EncoderSpec(384, 14, 1152, 1)
    tower = VisionTransformer(384, 14, 1152, 1, 16, mlp_ratio=2.0, output_dim=1)
    tower.prune_intermediate_layers([0], prune_norm=True, prune_head=True)
    monkeypatch.setitem(nanollava.model.ENCODERS, "wide", row)
    monkeypatch.setattr(nanollava.model, "build", lambda row, weights: Encoder(row, tower))
    llm = llm_folder(
        tmp_path,
        tokenizer,
        hidden_size=1024,
        intermediate_size=1024,
        num_attention_heads=16,
        num_key_value_heads=16,
    )
    visual = Visual("1x1", max_visual_tokens="128")
    torch.manual_seed(0)
    model = VLM(replace(tiny_recipe, encoder="wide", llm=llm, visual=visual))
    assert model.spec.side == 27 and model.projector[0].weight.shape == (1024, 1152)
    document = model.writer()(TURNS, [open_image(photo())])
    assert document.layouts[0].side == 8 and document.views.shape == (2, 3, 384, 384)
    model.set_trainable("full")
    optimizer = torch.optim.AdamW(model.groups(1e-4, 2e-5, 1e-4, 0.0))
    row = pack([document], 384)
    before = model(row).mean()
    before.backward()
    assert before.isfinite()
    for name, p in model.named_parameters():
        assert p.grad is not None and p.grad.isfinite().all() and p.grad.any(), name
    optimizer.step()
    with torch.no_grad():
        assert model(row).mean() < before
