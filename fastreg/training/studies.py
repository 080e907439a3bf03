"""What ``--study`` does: the comparison again at several values of the option that the study is named after.

A new study is a function here. It returns what changes in the settings, from one value to the next:

    @study("lr", epochs=5)
    def lr(options):
        "Learning rates around --lr."
        return [{"lr": options.lr * factor} for factor in (0.25, 0.5, 1, 2, 4)]

and ``--study lr`` works: every value is a comparison like any other, in one run with one table and one picture.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Study:
    """A list of comparisons that differ in one option, and in what has to go with it.

    Attributes:
        changes: from the ``Settings`` of the run to the fields that change, a dict for every comparison.
        defaults: of options that are not given on the command line, where the study has its own.
    """

    changes: Callable[[Any], list[dict]]
    defaults: dict[str, Any]


STUDIES: dict[str, Study] = {}


def study(name: str, **defaults: Any) -> Callable[[Callable], Callable]:
    """Decorator: makes a function available to ``--study`` under ``name``, the option that it varies."""

    def register(changes: Callable[[Any], list[dict]]) -> Callable[[Any], list[dict]]:
        STUDIES[name] = Study(changes, defaults)
        return changes

    return register


@study("batch-size", model="cnn", compare="batchnorm,groupnorm,layernorm,instancenorm", epochs=5)
def batch_size(options: Any) -> list[dict]:
    """2 to 64 examples of a step in every process, where ``lr`` is that of ``batch_size`` examples.

    The learning rate grows in proportion to the batch, as in the paper on group normalization (Wu and He,
    2018, arXiv 1803.08494), and as there the sizes are those that batch normalization sees.
    """
    sizes = [examples * options.processes for examples in (2, 4, 8, 16, 32, 64)]
    return [{"batch_size": size, "lr": options.lr * size / options.batch_size} for size in sizes]
