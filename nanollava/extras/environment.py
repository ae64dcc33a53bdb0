"""What a result depends on besides its recipe: the commit, the versions, the device."""

import platform
import shutil
import subprocess
from importlib.metadata import version

import torch

from nanollava.files import PACKAGE
from nanollava.recipe import Recipe

PACKAGES = ("torch", "transformers", "mosaicml", "mosaicml-streaming", "open_clip_torch")
# A change in these folders marks a commit as dirty. Results and pages are not code.
CODE = ("nanollava", "recipes", ":!recipes/ablations/results", ":!recipes/*.md")


def git(*arguments: str) -> subprocess.CompletedProcess:
    """Run git in the folder above the package."""
    command = ["git", "-C", str(PACKAGE.parent), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def commit() -> str:
    """The checkout's commit, with -dirty if its code has changed since.

    Empty without git, and for an installed package, which may lie in another project's checkout.
    """
    if not shutil.which("git"):
        return ""
    if git("ls-files", "--error-unmatch", "nanollava/files.py").returncode:
        return ""
    changed = git("diff", "--quiet", "HEAD", "--", *CODE).returncode == 1
    return git("rev-parse", "--short", "HEAD").stdout.strip() + ("-dirty" if changed else "")


def environment(recipe: Recipe, processes: int) -> dict:
    """What one start of a run depends on, an entry of its environment.json."""
    return {
        "python": platform.python_version(),
        **{package: version(package) for package in PACKAGES},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
        "processes": processes,
        "commit": commit(),
        "seed": recipe.seed,
    }
