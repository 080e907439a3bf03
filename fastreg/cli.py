"""``fastreg train | bench | inspect | doctor``: each command is defined by the package that does the work."""

import sys


def main() -> None:
    try:
        import typer
    except ImportError:
        sys.exit("fastreg: the command line needs typer and rich: pip install 'fastreg[train]'")

    from fastreg.bench.__main__ import app as bench
    from fastreg.bench.inspect import inspect
    from fastreg.doctor import doctor
    from fastreg.training.command import train

    app = typer.Typer(
        help="Regularization for PyTorch on Triton kernels.", no_args_is_help=True, add_completion=False
    )
    app.command()(train)
    app.add_typer(bench, name="bench")
    app.command()(inspect)
    app.command()(doctor)
    app()


if __name__ == "__main__":
    main()
