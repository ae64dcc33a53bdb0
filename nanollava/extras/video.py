"""A video's frames, for the demo and for lmms-eval: to the model they are several images."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
from PIL import Image

from nanollava.anyres import MAX_PIXELS, UNREADABLE

CONTAINERS = "mov,mp4,matroska,webm,avi,gif,mpegts,ogg,flv"  # no playlists: they open other files


def open_video(data: bytes | str | Path, count: int, limit: int = MAX_PIXELS) -> list[Image.Image]:
    """`count` frames, evenly spaced from the first to the last as in the released code.

    A shorter video gives all of its frames. Raises ValueError for a video that cannot be read, or
    that has more pixels than `limit` in a frame or than 100 times `limit` in all frames.
    """
    try:
        # What a file says of its length may be wrong. Its packets are counted: each holds a frame.
        with open_stream(data, limit) as stream:
            total = sum(packet.size > 0 for packet in stream.container.demux(stream))
        wanted = np.linspace(0, total - 1, min(count, total), dtype=int)
        with open_stream(data, limit) as stream:
            numbered = enumerate(stream.container.decode(stream))
            frames = [frame.to_image() for i, frame in numbered if i in wanted]
    except (*UNREADABLE, IndexError, av.FFmpegError) as error:
        raise ValueError(f"unreadable video: {error}") from error
    if not frames:
        raise ValueError("unreadable video: it has no frames")
    return frames


@contextmanager
def open_stream(data: bytes | str | Path, limit: int) -> Iterator[av.VideoStream]:
    """The first video stream of a file, before any of its frames is decoded."""
    source = io.BytesIO(data) if isinstance(data, bytes) else str(data)
    with av.open(source, options={"format_whitelist": CONTAINERS}) as container:
        stream = container.streams.video[0]
        if stream.codec_context is None:
            raise ValueError("no decoder for its pictures; convert it, for example to H.264")
        # Checked before anything is decoded: a small file can hold gigabytes of pictures.
        pixels = stream.width * stream.height
        most = 100 * limit
        if pixels > limit or pixels * stream.frames > most:
            size = f"{stream.frames} frames of {stream.width}x{stream.height} pixels"
            raise ValueError(f"{size}, limit {limit:,} each and {most:,} in all; make it smaller")
        yield stream
