"""The command line: `nanollava COMMAND --help`, or `python -m nanollava COMMAND --help`.

Each command imports what it needs when it runs, so that --help answers at once.
"""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
# What typer raises for a wrong command line: ClickException, of click or of typer's own copy of it.
# BadParameter inherits from UsageError, and that from ClickException.
USAGE_ERROR = typer.BadParameter.__mro__[2]
RecipeFile = Annotated[str, Argument(help="A recipe, e.g. recipes/nano.yaml")]
Overrides = Annotated[list[str] | None, Argument(help="key=value ...")]
Run = Annotated[Path, Argument(help="A run folder, e.g. runs/nano, or a LlavaOnevision folder")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train all stages of a recipe, then evaluate. `composer RECIPE` does the same."""
    from nanollava.recipe import read_recipe
    from nanollava.sources import function_of

    keys = read_recipe(recipe, overrides)
    if keys.program:
        function_of(keys.program)(keys)
        return
    from nanollava.extras.summary import score
    from nanollava.train import train as train_stages

    run = Path(os.path.relpath(train_stages(keys)))  # short where it is printed
    if any(keys.tasks.values()):
        score(run, [], 0, keys)


@app.command()
def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Download a recipe's sources and write their shards; training does this too."""
    from nanollava.data import prepare as write_shards
    from nanollava.recipe import read_recipe

    write_shards(read_recipe(recipe, overrides))


@app.command()
def evaluate(
    run: Run,
    tasks: Annotated[str, Option(help="names separated by commas; `blog`: all benchmarks")] = "",
    limit: Annotated[int, Option(min=0, help="only the first questions of each task")] = 0,
    beside: Annotated[str, Option(help="the row of the blog to show beside benchmarks")] = "T4:0",
) -> None:
    """Score a run on its recipe's tasks at each of its settings, or on lmms-eval's benchmarks."""
    from nanollava.extras.summary import score
    from nanollava.recipe import read_recipe

    names = [name for name in tasks.split(",") if name]
    own = read_recipe(run / "recipe.yaml").tasks if (run / "recipe.yaml").is_file() else {}
    if not names or any(name.startswith("nano-") or name in own for name in names):
        score(run, names, limit)
        return
    try:
        from nanollava.benchmarks.lmms import run_benchmarks
    except ImportError as error:
        raise ValueError(
            f"{error}. Benchmarks need lmms-eval: pip install lmms-eval==0.7.3 levenshtein"
        ) from error
    run_benchmarks(run, names, limit, beside)


@app.command()
def chat(
    run: Run,
    image: Path,
    question: str,
    max_grid: str | None = None,
    max_visual_tokens: str | None = None,
    max_new_tokens: int = 128,
    why: Annotated[bool, Option("--why", help="draw where the answer looked")] = False,
) -> None:
    """Ask one question about an image, and print what the model saw."""
    from nanollava.generate import load

    assistant = load(run)
    visual = {"max_grid": max_grid, "max_visual_tokens": max_visual_tokens}
    for piece in assistant.chat(image, question, None, max_new_tokens, stream=True, **visual):
        typer.echo(piece, nl=False)
    typer.echo(f"\n\n{assistant.seen.describe()}")
    if why:
        assistant.why().save(run / "why.png")
        typer.echo(f"where it looked, base view and tiles: {run / 'why.png'}")


@app.command()
def plan(
    recipe: RecipeFile,
    overrides: Overrides = None,
    device: Annotated[str, Option(help="h200, h100, a100, 4090 or cpu")] = "h200",
    devices: Annotated[int, Option(min=1, help="how many of them")] = 1,
    share: Annotated[float, Option(help="of peak FLOP/s that you expect to reach")] = 0.4,
    as_json: Annotated[bool, Option("--json")] = False,
) -> None:
    """Estimate a run's tokens, FLOPs, memory and hours before it starts."""
    from nanollava.extras.plan import print_plan
    from nanollava.recipe import read_recipe

    print_plan(read_recipe(recipe, overrides), device, devices, share, as_json)


@app.command()
def export(run: Path, out: Path) -> None:
    """Write a run as a LlavaOnevision folder for plain transformers, if both give equal logits."""
    from nanollava.hf.export import export as write_folder

    write_folder(run, out)


@app.command()
def ablate(
    file: Annotated[Path, Argument(help="Rows, e.g. recipes/ablations/grids.yaml")],
    seeds: Annotated[int, Option(min=1, help="how many")] = 5,
    first: Annotated[int, Option(min=0, help="first seed; 100 and above are for tuning")] = 0,
    only: Annotated[list[str] | None, Option("--only", help="rows; all if none is given")] = None,
    workers: Annotated[int, Option(min=0, help="runs side by side")] = os.cpu_count() or 1,
    full: Annotated[bool, Option("--full", help="the full-size models, one at a time")] = False,
) -> None:
    """Train and score the rows of an ablation; resumes if interrupted."""
    from nanollava.ablations.ablate import ablate as run_rows

    run_rows(file, seeds, first, only or [], workers, full)


@app.command()
def recaption(
    source: Annotated[str, Argument(help="KIND:WHERE, FILE.py:NAME or a name of sources.yaml")],
    model: Annotated[Path, Option(help="a run or a LlavaOnevision folder")],
    out: Annotated[Path, Option(help="where the captions go")],
    prompt: str = "Please generate detailed descriptions of the given image.",
    max_new_tokens: Annotated[int, Option(min=1)] = 512,
    samples: Annotated[int, Option(min=0, help="only the first records; 0: all")] = 0,
    seed: int = 0,
) -> None:
    """Describe a source's images with a model; resumes if interrupted."""
    from nanollava.extras.recaption import recaption as describe_source

    describe_source(source, model, out, prompt, max_new_tokens, samples, seed)


def run(arguments: list[str] | None = None) -> None:
    """Run a command. What a user can fix is one line; NANOLLAVA_TRACE=1 shows where it arose."""
    try:
        code = app(arguments, prog_name="nanollava", standalone_mode=False)
        if code:  # of Ctrl-C, which typer turns into an exit
            sys.exit(code)
    except USAGE_ERROR as error:
        error.show()
        sys.exit(2)
    except (ValueError, OSError) as error:
        if os.environ.get("NANOLLAVA_TRACE"):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
