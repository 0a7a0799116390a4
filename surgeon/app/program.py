"""The program that typer runs, and how a function becomes one of its commands."""

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from surgeon._version import __version__
from surgeon.app.terminal import results_only

app = typer.Typer(
    name="surgeon",
    help="Swap the convolutions of a network you have for other blocks, train it, fold it back, prove it with numbers.",
    epilog="Example: surgeon convert model.pt --recipe acnet   ·   surgeon demo shows it all in a minute.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def command(epilog: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make a function a command, whose epilog ends its help."""

    def register(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(*args: Any, **options: Any) -> None:
            with results_only():
                function(*args, **options)

        return app.command(epilog=epilog)(run)

    return register


@app.callback(invoke_without_command=True)
def _root(
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    if version:
        print(f"surgeon {__version__}")
        raise typer.Exit
