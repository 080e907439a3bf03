"""``fastreg convert``: what becomes of a model, from the command line."""

import importlib
import importlib.util
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import nn

from fastreg.conversion.report import explain


class SpecError(ValueError):
    """A model that cannot be found, in one line."""


def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="timm/resnet50, torchvision/vit_b_16, transformers/bert, or module.py:function.",
        ),
    ],
    example: Annotated[
        str | None,
        typer.Option(
            metavar="SHAPE", help="Shape of an input, as 8x3x224x224: counts the bytes that fusion saves."
        ),
    ] = None,
    fuse: Annotated[bool, typer.Option(help="Fuse layers, too.")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="Print plain data.")] = False,
) -> None:
    """Show what fastreg.convert makes of a model: each layer, each seam, what is left and why.

    The model is made without weights being downloaded, and nothing is written.
    """
    try:
        found = explain(load(model), _tensor(example), fuse=fuse)
    except (SpecError, RuntimeError, TypeError) as error:
        typer.echo(f"fastreg convert: {error}", err=True)
        sys.exit(2)
    if as_json:
        print(json.dumps(found.as_dict(), indent=2))
        return
    from rich import print as show

    show(found)


def load(spec: str) -> nn.Module:
    """The model that ``spec`` names, with random weights."""
    library, _, name = spec.partition("/")
    if library in _LIBRARIES and name:
        try:
            return _LIBRARIES[library](name)
        except ImportError as error:
            raise SpecError(f"{library} is not installed ({error})") from None
    path, _, function = spec.rpartition(":")
    if not function or not path:
        known = ", ".join(f"{library}/NAME" for library in _LIBRARIES)
        raise SpecError(f"cannot read {spec!r}: expected {known}, or module.py:function")
    return _from_file(path, function)


def _timm(name: str) -> nn.Module:
    import timm

    if name not in timm.list_models():
        raise SpecError(f"timm has no model {name!r}")
    return timm.create_model(name, pretrained=False)


def _torchvision(name: str) -> nn.Module:
    from torchvision import models

    if name not in models.list_models():
        raise SpecError(f"torchvision has no model {name!r}")
    return models.get_model(name, weights=None)


def _transformers(name: str) -> nn.Module:
    import transformers

    try:
        config = transformers.AutoConfig.for_model(name)
    except ValueError as error:
        raise SpecError(f"transformers has no model {name!r}") from error
    return transformers.AutoModel.from_config(config)


_LIBRARIES = {"timm": _timm, "torchvision": _torchvision, "transformers": _transformers}


def _from_file(path: str, function: str) -> nn.Module:
    try:
        if path.endswith(".py"):
            if not Path(path).is_file():
                raise SpecError(f"there is no file {path}")
            spec = importlib.util.spec_from_file_location(Path(path).stem, path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
        else:
            module = importlib.import_module(path)
        make = getattr(module, function)
    except (ImportError, AttributeError) as error:
        raise SpecError(f"cannot import {function!r} from {path}: {error}") from None
    model = make if isinstance(make, nn.Module) else make()
    if not isinstance(model, nn.Module):
        raise SpecError(f"{path}:{function} returned a {type(model).__name__}, and no module")
    return model


def _tensor(shape: str | None) -> Any:
    if shape is None:
        return None
    try:
        return torch.zeros([int(size) for size in shape.split("x")], dtype=torch.float32)
    except ValueError:
        raise SpecError(f"cannot read the shape {shape!r}: expected sizes with x between them") from None
