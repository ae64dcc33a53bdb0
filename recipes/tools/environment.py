"""What a result depends on beside its recipe: the commit, the versions, the device."""

import platform
import shutil
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from nanollava.recipe import Recipe

PACKAGES = ("torch", "transformers", "mosaicml", "mosaicml-streaming", "open_clip_torch")
ROOT = Path(__file__).parents[2]
CODE = ("nanollava", "recipes", ":!recipes/ablations/results", ":!recipes/*.md")


def commit() -> str:
    """This checkout's commit, with -dirty where its code was changed; "" outside of git."""
    if not shutil.which("git"):
        return ""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", *CODE], capture_output=True)
    return head.stdout.strip() + ("-dirty" if changed.returncode == 1 else "")


def environment(recipe: Recipe, processes: int) -> dict:
    """One start of a run, for its environment.json."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": processes,
        "commit": commit(),
        "seed": recipe.seed,
    }
