"""Why a model, or a part of it, cannot be converted."""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.lazy import LazyModuleMixin


def obstacle_of_all(module: nn.Module) -> str | None:
    """Why ``module`` and everything inside it has to stay as it is, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "scripted"
    if isinstance(getattr(module, "_orig_mod", None), nn.Module) or module._compiled_call_impl is not None:
        return "compiled already: convert first, then compile"
    if _is_sharded(module):
        return "sharded by FSDP already: convert first, then shard"
    if hasattr(module, "parametrizations"):
        return "parametrized"
    return None


def _is_sharded(module: nn.Module) -> bool:
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    if fsdp is None:
        return False
    kinds = [getattr(fsdp, name, None) for name in ("FSDPModule", "FullyShardedDataParallel")]
    return isinstance(module, tuple(kind for kind in kinds if kind is not None))


def obstacle(module: nn.Module) -> str | None:
    """Why the class of ``module`` cannot be changed, or None."""
    if "forward" in vars(module):
        return "its forward was replaced"
    if isinstance(module, LazyModuleMixin) and type(module).cls_to_become is not None:
        return "lazy: it becomes a layer with the first batch"
    return None
