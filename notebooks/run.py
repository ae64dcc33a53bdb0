"""Run notebooks from top to bottom and keep their outputs.

    python notebooks/run.py notebooks/01*.ipynb                    # the outputs that are committed
    NANOLLAVA_QUICK=1 python notebooks/run.py --check notebooks/*.ipynb     # shorter, nothing kept

A cell that fails stops the run with its traceback. Progress bars keep their last state only.
"""

import base64
import io
import os
import re
import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 300_000  # bytes of a committed notebook
QUICK = "NANOLLAVA_QUICK" in os.environ


def small(png: str) -> str:
    """A picture in base64 with 128 colours at most: a third of its bytes, by eye the same."""
    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    image.quantize(128, dither=Image.Dither.NONE).save(file := io.BytesIO(), "PNG", optimize=True)
    return min(base64.b64encode(file.getvalue()).decode(), png, key=len)


def clean(notebook: NotebookNode) -> None:
    """Drop what a rerun would change for no reason, and what names this machine."""
    notebook.metadata = {
        "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}
    }
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        kept: list[NotebookNode] = []
        for output in cell.get("outputs", []):
            stream = output.get("name") if output.output_type == "stream" else None
            if stream and kept and kept[-1].get("name") == stream:
                kept[-1].text += output.text
            else:
                kept.append(output)
        for output in kept:
            if output.output_type == "stream":
                lines = output.text.replace("\r\n", "\n").split("\n")
                text = "\n".join(line.rstrip("\r").split("\r")[-1] for line in lines)
                output.text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).replace(f"{ROOT}/", "")
            elif "image/png" in output.get("data", {}):
                output.data["image/png"] = small(output.data["image/png"])
        if cell.cell_type == "code":
            cell.outputs = kept


def run(file: Path) -> NotebookNode:
    """A notebook's cells, run in its own folder; raises at the first cell that fails."""
    notebook, start = nbformat.read(file, as_version=4), time.time()
    client = NotebookClient(
        notebook, timeout=500 if QUICK else 1800, resources={"metadata": {"path": file.parent}}
    )
    # nbclient's stand-in for a slider's output writes to the kernel while a reply is awaited, which
    # can then go unseen (nbclient #312). Without it sliders draw into the cell.
    client.widget_registry = {}
    client.execute()
    clean(notebook)
    notebook.metadata["nanollava"] = {"seconds": round(time.time() - start), "quick": QUICK}
    return notebook


def main(*names: str) -> None:
    """Run each; unless --check is given, write the outputs back."""
    if QUICK and "--check" not in names:
        raise ValueError("quick outputs are not kept: unset NANOLLAVA_QUICK, or add --check")
    for file in (Path(name) for name in names if name != "--check"):
        notebook = run(file)
        text, seconds = nbformat.writes(notebook), notebook.metadata["nanollava"]["seconds"]
        print(f"{file.name}: {seconds} s, {len(text) / 1000:.0f} KB", flush=True)
        if len(text) > LIMIT:
            raise ValueError(f"{file}: {len(text)} bytes; a notebook may have {LIMIT}")
        if "--check" not in names:
            file.write_text(text + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
