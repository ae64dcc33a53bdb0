"""The wheel, used from another folder: nothing of the checkout is needed but recipes."""

import json
import os
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from launching import ROOT, write_recipe
from packaging.requirements import Requirement
from PIL import Image

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The folder that `pip install` fills, from a wheel built of a copy of the files in git."""
    folder = tmp_path_factory.mktemp("install")
    files = subprocess.check_output(["git", "-C", ROOT, "ls-files"], text=True).splitlines()
    for name in files:
        kept = ("nanollava/", "recipes/", "pyproject.toml", "README.md", "LICENSE")
        if name.startswith(kept) and (ROOT / name).exists():
            copy = folder / "copy" / name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "-w", folder, folder / "copy"]
    subprocess.run([*pip, *build], check=True)
    (wheel,) = folder.glob("nanollava-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--target", folder / "site", wheel], check=True)
    return folder / "site"


@pytest.fixture(scope="module")
def trained(installed, tmp_path_factory):
    """(folder, its run) of the tiny recipe, trained by the installed command."""
    folder = tmp_path_factory.mktemp("elsewhere")
    recipe = write_recipe(folder)
    command(installed, folder, "train", recipe, "run=runs/mine", "stages.stage2.duration=2ba")
    return folder, folder / "runs/mine"


def command(installed: Path, folder: Path, *words, code: int = 0) -> str:
    """The installed program `nanollava WORDS` in a folder; returns what it prints."""
    environment = os.environ | {"PYTHONPATH": str(installed), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, installed / "bin/nanollava", *map(str, words)],
        env=environment,
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def test_what_is_in_the_wheel(installed):
    (wheel,) = installed.parent.glob("nanollava-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert "nanollava/ablations/blog.json" in names
    assert "nanollava/recipes/sources.yaml" in names and "nanollava/recipes/eval/utils.py" in names
    assert not [name for name in names if name.startswith(("recipes/", "nanollava/recipes/nano"))]


def test_the_installed_package_is_the_one_that_is_used(installed, tmp_path):
    code = "import nanollava, nanollava.files as f; print(f.PACKAGE, f.repository_file('eval'))"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    words = [sys.executable, "-c", code]
    told = subprocess.check_output(words, env=environment, cwd=tmp_path, text=True).split()
    assert told == [f"{installed}/nanollava", f"{installed}/nanollava/recipes/eval"]
    assert "recaption" in command(installed, tmp_path, "--help")


def test_every_command_works_from_another_folder(installed, trained, tmp_path):
    folder, run = trained
    starts = json.loads((run / "environment.json").read_text())
    assert starts[0]["commit"] == "", "no checkout is around an installed package"
    assert "nano-mixed" in command(installed, folder, "evaluate", run)
    Image.new("RGB", (150, 60), (200, 30, 30)).save(tmp_path / "red.png")
    told = command(installed, tmp_path, "chat", run, tmp_path / "red.png", "what is it?")
    assert "saw 150x60 pixels" in told
    planned = command(installed, tmp_path, "plan", folder / "tiny.yaml", "--device", "cpu")
    assert "stage1_5" in planned and "hours" in planned
    refused = command(installed, tmp_path, "export", run, tmp_path / "out", code=1)
    assert "visual.budget" in refused and not (tmp_path / "out").exists()
    blogs = ROOT / "recipes/qwen05b.yaml"
    assert "positions per sample" in command(installed, tmp_path, "plan", blogs)


def test_ranges_hold_the_versions_that_are_tested():
    pins = {}
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        if "==" in line:
            name, _, version = line.partition("==")
            pins[name.lower().replace("-", "_")] = version
    extras = PROJECT["optional-dependencies"]
    checked = 0
    for text in [*PROJECT["dependencies"], *extras["demo"], *extras["notebooks"]]:
        wanted = Requirement(text)
        pin = pins.get(wanted.name.lower().replace("-", "_"))
        if pin is not None:
            assert pin in wanted.specifier, text
            checked += 1
    assert checked >= 15
