"""The command line: `python -m nanollava COMMAND --help`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from nanollava.recipe import Recipe, read_recipe
from nanollava.sources import function_of, tool

# What typer raises for a wrong command line, of click or of its own copy of it.
USAGE = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")
app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
BESIDE = ("plan", "export", "ablate", "recaption")  # commands that are files of recipes/tools
RecipeFile = Annotated[str, typer.Argument(help="A recipe, e.g. recipes/nano.yaml")]
Overrides = Annotated[list[str] | None, typer.Argument(help="key=value ...")]
Run = Annotated[Path, typer.Argument(help="A run folder, e.g. runs/nano, or a LlavaOnevision's")]


@app.command()
def train(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Train all stages of a recipe, then evaluate. `composer RECIPE` does the same."""
    keys = read_recipe(recipe, overrides)
    if keys.program:
        function_of(keys.program)(keys)
        return
    from nanollava.train import train as run_stages

    run = Path(os.path.relpath(run_stages(keys)))  # short where it is printed
    if any(keys.tasks.values()):
        score(run, [], 0, keys)


@app.command()
def prepare(recipe: RecipeFile, overrides: Overrides = None) -> None:
    """Write the shards of a recipe's sources; training does it too."""
    from nanollava.data import prepare as write

    write(read_recipe(recipe, overrides))


@app.command()
def evaluate(
    run: Run, tasks: str = "", limit: Annotated[int, typer.Option(min=0)] = 0, beside: str = "T4:0"
) -> None:
    """Score a run on its recipe's tasks, at each of its settings; on some of them (--tasks a,b), or
    on lmms-eval's benchmarks, `blog` for all of the blog's, beside a row of its tables.
    """
    names = [name for name in tasks.split(",") if name]
    own = read_recipe(run / "recipe.yaml").tasks if (run / "recipe.yaml").is_file() else {}
    if names and not any(name.startswith("nano-") or name in own for name in names):
        tool("benchmarks").main(run, names, limit, beside)
    else:
        score(run, names, limit)


def score(run: Path, tasks: list[str], limit: int, keys: Recipe | None = None) -> None:
    """Evaluate; the first process prints the table and, after training, what to type next."""
    from dataclasses import replace

    from nanollava import evaluate as evaluation
    from nanollava.generate import load

    rank, _ = evaluation.ranks()
    assistant = load(run)
    if keys is not None:  # tasks may have been changed since the run was trained
        recipe = replace(assistant.model.recipe, tasks=keys.tasks, settings=keys.settings)
        assistant.model.recipe = recipe
    rows = evaluation.evaluate(assistant, run, tasks, limit)
    if rank == 0:
        tool("scores").show(rows)
        if keys is not None:
            typer.echo(f"\nNext: {tool('sample').save_sample(assistant, run)}")


@app.command()
def chat(
    run: Run, image: Path, question: str, max_grid: str | None = None,
    max_visual_tokens: str | None = None, max_new_tokens: int = 128,
    why: Annotated[bool, typer.Option("--why", help="draw where the answer looked")] = False,
) -> None:  # fmt: skip
    """Ask one question about an image, and tell what the model saw."""
    from nanollava.generate import load

    assistant = load(run)
    visual = {"max_grid": max_grid, "max_visual_tokens": max_visual_tokens}
    for piece in assistant.chat(image, question, None, max_new_tokens, stream=True, **visual):
        typer.echo(piece, nl=False)
    typer.echo(f"\n\n{assistant.seen.describe()}")
    if why:
        assistant.why().save(run / "why.png")
        typer.echo(f"where it looked, base view and tiles: {run / 'why.png'}")


def run(arguments: list[str] | None = None) -> None:
    """Run a command; what a user can mend is one line, NANOLLAVA_TRACE=1 shows where it arose."""
    asked = (arguments or sys.argv[1:] or [""])[0]
    if asked not in [command.callback.__name__ for command in app.registered_commands]:
        for name in [asked] if asked in BESIDE else BESIDE:  # all of them for --help
            app.command(name)(tool(name).main)
    try:
        app(arguments, prog_name="nanollava", standalone_mode=False)
    except USAGE as error:
        error.show()
        sys.exit(2)
    except (ValueError, OSError) as error:
        if os.environ.get("NANOLLAVA_TRACE"):
            raise
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    run()
