"""The demo under visitors: seconds to a usable page, to the first token, and with k at once.

    python tests/bench/demo.py

Everything goes through Gradio's client, so a figure is what a visitor waits for. Visitors ask at
the same moment, each about a page that is new to them in every round.
"""

import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

from gradio_client import Client, handle_file

from nanollava.sources import function_of

ROOT = Path(__file__).parents[2]
KEYS = ("nano", 3, 10, "bilinear", False, 0, 10)


def pages(folder: Path, count: int) -> list[tuple[Path, str]]:
    """Fresh pages as files, each with a question."""
    made = []
    for i, record in enumerate(function_of(f"{ROOT}/recipes/nano/world.py:doc")("val", count, 0)):
        file = folder / f"{i}.png"
        file.write_bytes(record["image"])
        made.append((file, record["conversations"][0]["value"].removeprefix("<image>\n")))
    return made


def wait(client: Client, text: str, files: list[Path]) -> tuple[float, float]:
    """Seconds to the first piece of an answer, and to its end."""
    start, first = time.perf_counter(), 0.0
    message = {"text": text, "files": [handle_file(str(file)) for file in files]}
    for out in client.submit(message, *KEYS, api_name="/ask"):
        if not first and "&hellip;" not in out[0]:
            first = time.perf_counter() - start
    return first, time.perf_counter() - start


def usable(port: int, server: subprocess.Popen) -> Client:
    """A client, as soon as the page answers."""
    while server.poll() is None:
        with socket.socket() as door:
            if door.connect_ex(("127.0.0.1", port)) == 0:
                return Client(f"http://127.0.0.1:{port}", verbose=False)
        time.sleep(0.1)
    raise RuntimeError(f"the demo ended with exit code {server.returncode}")


def serve(*words: str, **environment: str) -> tuple[subprocess.Popen, int]:
    """The demo, and its port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "demo/app.py"), "--port", str(port), *words]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, env={**os.environ, **environment}, **quiet), port


def main() -> None:
    """Start the demo, measure, stop it."""
    start = time.perf_counter()
    server, port = serve()
    try:
        client = usable(port, server)
        print(f"usable after {time.perf_counter() - start:.1f} s")
        with tempfile.TemporaryDirectory() as folder:
            measure(client, lambda: usable(port, server), pages(Path(folder), 64))
    finally:
        server.terminate()


def measure(client: Client, another: Callable[[], Client], asked: list[tuple[Path, str]]) -> None:
    """Print the first token about a new and about the same image, then answers to k visitors."""
    fresh = iter(asked)
    wait(client, "What is the tax?", [next(fresh)[0]])  # warm
    first = [wait(client, text, [file]) for file, text in islice(fresh, 5)]
    second = [wait(client, "Read the text.", []) for _ in range(5)]
    print(
        f"first token: {statistics.median(f for f, _ in first):.3f} s about a new image, "
        f"{statistics.median(f for f, _ in second):.3f} s about the same one"
    )
    alone, twice = statistics.median(total for _, total in first), 0
    for k in (1, 2, 4, 8):
        visitors, times = [another() for _ in range(k)], []
        with ThreadPoolExecutor(k) as pool:
            for _ in range(3):
                pairs = zip(visitors, islice(fresh, k))
                times += [t for _, t in pool.map(lambda p: wait(p[0], p[1][1], [p[1][0]]), pairs)]
        whole = statistics.median(times)
        twice = k if whole <= 2 * alone else twice
        print(f"{k} visitors at once: {whole:.2f} s an answer, {whole / alone:.1f} x alone")
    print(f"answers take less than twice as long up to {twice} of these")


if __name__ == "__main__":
    main()
