"""A video's frames, for the demo and for lmms-eval: to the model they are several images."""

import io
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np
from PIL import Image

from nanollava.anyres import MAX_PIXELS, UNREADABLE

CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpegts,ogg,flv"


def open_video(data: bytes | str | Path, count: int, limit: int = MAX_PIXELS) -> list[Image.Image]:
    """`count` frames evenly spaced from the first to the last, as the released code takes them;
    all frames of a shorter video. Raises ValueError for what cannot be read, and for more pixels
    than the limit in a frame or than 100 times the limit in all of them.
    """

    def pieces(cut: str) -> Iterator:
        source = io.BytesIO(data) if isinstance(data, bytes) else str(data)
        with av.open(source, options={"format_whitelist": CONTAINERS}) as video:
            stream = video.streams.video[0]
            if stream.codec_context is None:
                raise ValueError("no decoder for its pictures")
            pixels = stream.width * stream.height
            if pixels > limit or pixels * stream.frames > 100 * limit:
                size = f"{stream.frames} frames of {stream.width}x{stream.height} pixels"
                raise ValueError(f"{size}, limit {limit:,} each and {100 * limit:,} in all")
            yield from getattr(video, cut)(stream)

    try:
        total = sum(packet.size > 0 for packet in pieces("demux"))
        wanted = np.linspace(0, total - 1, min(count, total), dtype=int)
        frames = [x.to_image() for i, x in enumerate(pieces("decode")) if i in wanted]
    except (*UNREADABLE, IndexError, av.FFmpegError) as error:
        raise ValueError(f"unreadable video: {error}") from error
    if not frames:
        raise ValueError("unreadable video: it has no frames")
    return frames
