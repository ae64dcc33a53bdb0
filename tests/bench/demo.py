"""The demo under visitors: seconds to a usable page, to the first token, and with k at once.

    python tests/bench/demo.py

Everything goes through Gradio's client, so a figure is what a visitor waits for. Visitors ask about
different pages at the same moment; the last line is how many can before answers take twice as long.
"""

import socket
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gradio_client import Client, handle_file

from nanollava.sources import function_of

ROOT = Path(__file__).parents[2]
ADDRESS = ("127.0.0.1", 7890)
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


def usable() -> Client:
    """A client, as soon as the page answers."""
    while True:
        with socket.socket() as door:
            if door.connect_ex(ADDRESS) == 0:
                return Client("http://{}:{}".format(*ADDRESS), verbose=False)
        time.sleep(0.1)


def main() -> None:
    """Start the demo, measure, stop it."""
    start = time.perf_counter()
    command = [sys.executable, str(ROOT / "demo/app.py"), "--port", str(ADDRESS[1])]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = usable()
        print(f"usable after {time.perf_counter() - start:.1f} s")
        asked = pages(Path(tempfile.mkdtemp()), 16)
        wait(client, "What is the tax?", [asked[0][0]])  # warm
        first = [wait(client, text, [file]) for file, text in asked[:5]]
        second = [wait(client, "Read the text.", []) for _ in range(5)]
        print(
            f"first token: {statistics.median(f for f, _ in first):.3f} s about a new image, "
            f"{statistics.median(f for f, _ in second):.3f} s about the same one"
        )
        alone = statistics.median(total for _, total in first)
        for k in (1, 2, 4, 8):
            visitors = [usable() for _ in range(k)]
            with ThreadPoolExecutor(k) as pool:
                times = [
                    t
                    for _ in range(3)
                    for _, t in pool.map(
                        lambda pair: wait(pair[0], pair[1][1], [pair[1][0]]), zip(visitors, asked)
                    )
                ]
            whole = statistics.median(times)
            print(f"{k} visitors at once: {whole:.2f} s an answer, {whole / alone:.1f} x alone")
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
