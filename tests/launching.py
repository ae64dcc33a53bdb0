"""Helpers of the tests that launch a recipe as a user does, in processes of its own."""

import csv
import os
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file
from transformers import AutoTokenizer, Qwen2Config

from nanollava.runs import read_losses

ROOT = Path(__file__).parent.parent
LAUNCHER = str(Path(sys.executable).parent / "composer")
RECIPE = """if __name__ == "__main__": __import__("nanollava").main(__file__); r'''
run: runs/tiny
data: {folder}/shards
encoder: nano_s
encoder_weights: random
llm: {folder}/llm
llm_weights: random
precision: fp32
workers: 1
visual: {{max_grid: 3x3, max_visual_tokens: 6T}}
sources:
  mixed: {{path: "{root}/tests/mixed_source.py:mixed", samples: 80}}
stages:
  stage1: {{sources: {{mixed: 1}}, train: projector, template: qwen_1_5, anyres: false, lr: 1e-3,
            batch_size: 4, duration: 4ba, save_interval: 2}}
  stage1_5: {{sources: {{mixed: 1}}, lr: 1e-3, vision_lr: 1e-3, batch_size: 4, duration: 4ba,
              save_interval: 2, microbatch_tokens: 300}}
  stage2: {{sources: {{mixed: 1}}, lr: 1e-3, vision_lr: 1e-3, batch_size: 4, duration: 20ba,
            save_interval: 3, microbatch_tokens: 300}}
tasks:
  nano-mixed: {{path: "{root}/tests/mixed_source.py:mixed", metric: exact, samples: 5,
               max_new_tokens: 3}}
settings: {{base: {{max_grid: base}}, grid: {{max_grid: 3x3}}}}
# '''
"""


def write_recipe(folder: Path) -> Path:
    """A recipe of seconds: tiny random models, the stages and the trainer of the real ones."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "recipes/nano/tokenizer")
    tokenizer.save_pretrained(folder / "llm")
    Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        architectures=["Qwen2ForCausalLM"],
    ).save_pretrained(folder / "llm")
    file = folder / "tiny.yaml"
    file.write_text(RECIPE.format(folder=folder, root=ROOT))
    return file


def command(*words: str, code: int = 0, cwd: Path | None = None) -> str:
    """Run `python WORDS`; returns its output."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *map(str, words)], env=environment, cwd=cwd, capture_output=True, text=True
    )
    assert (done.returncode == 0) == (code == 0), done.stdout + done.stderr
    return done.stdout + done.stderr


def start(recipe: Path, *overrides: str, flags: tuple[str, ...] = (), **environment: str):
    """`composer FLAGS recipe overrides`, its output kept in one pipe; without flags, the program
    that the launcher would start, since the launcher's own imports take ten seconds.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **environment}
    words = [LAUNCHER if flags else sys.executable, *flags, str(recipe), *overrides]
    return subprocess.Popen(
        words,
        cwd=recipe.parent,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen, code: int = 0) -> str:
    """Wait; returns the output, and shows it where the exit code is another."""
    output, _ = process.communicate(timeout=300)
    assert (process.returncode == 0) == (code == 0), output[-4000:]
    return output


def losses(run: Path) -> dict[tuple[str, int], float]:
    """{(stage, step): loss over all sources} of a run's losses.csv."""
    with (run / "losses.csv").open() as file:
        rows = list(csv.DictReader(file))
    return {(r["stage"], int(r["step"])): float(r["loss"]) for r in rows if r["source"] == "all"}


def check_equal_runs(one: Path, two: Path) -> None:
    """The same weights to the last bit, the same loss of each source at each step."""
    first, second = (load_file(run / "model.safetensors") for run in (one, two))
    assert first.keys() == second.keys() and all(first[k].equal(second[k]) for k in first)
    first, second = (
        [{k: v for k, v in row.items() if k != "seconds"} for row in read_losses(run)]
        for run in (one, two)
    )
    assert first == second and len(first) >= 28


def stop_at(process, run, moment, signal_number) -> str:
    """Send a signal to the whole launch once (stage, step) has been logged."""
    for _ in range(4800):  # four minutes, on a busy machine
        if (run / "losses.csv").exists() and moment in losses(run):
            os.killpg(process.pid, signal_number)
            return process.communicate(timeout=120)[0]
        if process.poll() is not None:  # it ended before that step: what it printed says why
            break
        time.sleep(0.05)
    raise AssertionError(process.communicate(timeout=10)[0])
