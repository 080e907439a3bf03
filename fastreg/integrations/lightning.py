"""A callback for Lightning that converts the model, and its optimizers, before training.

trainer = lightning.Trainer(callbacks=[Convert()])
"""

from collections.abc import Callable
from typing import Any

from torch import nn

try:
    from lightning.pytorch import Callback
except ImportError:
    from pytorch_lightning import Callback

from fastreg.conversion import convert, convert_optimizer
from fastreg.conversion.optimizer import OURS


class Convert(Callback):
    """Converts the module in ``setup``, before it is wrapped for several devices, compiled or sharded.

    Args:
        fuse, filter: as for :func:`fastreg.convert`.
        optimizers: also convert torch's SGD, Adam and AdamW; others stay as they are.
    """

    def __init__(
        self,
        *,
        fuse: bool | str = True,
        filter: Callable[[nn.Module, str], bool] | None = None,
        optimizers: bool = True,
    ) -> None:
        self.fuse = fuse
        self.filter = filter
        self.optimizers = optimizers

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        convert(pl_module, fuse=self.fuse, filter=self.filter)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        if self.optimizers:
            for optimizer in trainer.optimizers:
                if type(optimizer) in OURS:
                    convert_optimizer(optimizer)
