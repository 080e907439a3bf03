"""``fastreg train | convert | bench | inspect | doctor``: each command is defined by the package that does the work."""

import sys
from importlib import import_module

# Where a command is defined, and what --help says of it without importing that, and torch with it.
COMMANDS = {
    "train": (
        "fastreg.training.command:train",
        "Train on images with and without regularization, and compare.",
    ),
    "convert": (
        "fastreg.conversion.command:convert",
        "Show what becomes of a model's layers, and what is left and why.",
    ),
    "bench": (
        "fastreg.bench.__main__:app",
        "Benchmarks: run, steps, host, pieces, lesson, models, report, check, list.",
    ),
    "inspect": (
        "fastreg.bench.inspect:inspect",
        "Read in the machine code how well the kernels are compiled.",
    ),
    "doctor": ("fastreg.doctor:doctor", "Show what runs where on this machine, and what is missing."),
}


def main() -> None:
    try:
        import typer
    except ImportError:
        sys.exit("fastreg: the command line needs typer and rich: pip install 'fastreg[train]'")

    def show_version(wanted: bool) -> None:
        if wanted:
            from fastreg import __version__

            print(f"fastreg {__version__}")
            raise typer.Exit

    app = typer.Typer(no_args_is_help=True, add_completion=False)

    @app.callback()
    def options(
        version: bool = typer.Option(
            False, "--version", help="Show the version.", callback=show_version, is_eager=True
        ),
    ) -> None:
        """Regularization for PyTorch on Triton kernels."""

    wanted = next((argument for argument in sys.argv[1:] if not argument.startswith("-")), None)
    for name, (place, summary) in COMMANDS.items():
        if name != wanted:
            app.command(name, help=summary)(lambda: None)
            continue
        module, attribute = place.split(":")
        command = getattr(import_module(module), attribute)
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=name)
        else:
            app.command(name)(command)
    app()


if __name__ == "__main__":
    main()
