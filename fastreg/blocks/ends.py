"""The seams at the end of a branch, as ``explain`` lists them, for every block that ends in one of these ways."""

from torch import nn

from fastreg.blocks.swap import Seam

SUM_REUSED = "add -> norm, sum reused"
NO_KERNEL = "no kernel drops samples and normalizes: dropping and adding are one pass, the norm another"
NEXT_BLOCK = "the norm belongs to the next block"


def dropping(module: nn.Module | None) -> str | None:
    """What it drops: "drop path" or "dropout"; None: nothing."""
    if module is None:
        return None
    p = next((getattr(module, name) for name in ("p", "drop_prob") if hasattr(module, name)), 0.0)
    if not p:
        return None
    return "dropout" if isinstance(module, nn.Dropout) else "drop path"


def norm_end(norm: str, drop: nn.Module | None, drop_name: str) -> list[Seam]:
    """skip + drop(norm(branch))"""
    kind = dropping(drop)
    if kind is None:
        return [Seam("norm -> add", (norm,))]
    return [
        Seam(f"norm -> {kind}", (norm, drop_name), "no kernel drops behind a norm"),
        Seam(f"{kind} -> add", (drop_name,)),
    ]


def plain_end(drop: nn.Module | None, drop_name: str) -> list[Seam]:
    """skip + drop(branch)"""
    kind = dropping(drop)
    return [] if kind is None else [Seam(f"{kind} -> add", (drop_name,))]


def layer_end(layer: nn.Module, name: str, drop: nn.Module | None, drop_name: str) -> list[Seam]:
    """skip + drop(layer(...)), where layer may be a norm or a dropout"""
    if isinstance(layer, nn.modules.batchnorm._NormBase):
        return norm_end(name, drop, drop_name)
    if isinstance(layer, nn.Dropout) and dropping(drop) is None:
        return plain_end(layer, name)
    return plain_end(drop, drop_name)


def prenorm(drop: nn.Module | None, drop_name: str, norm: str) -> list[Seam]:
    """h = skip + drop(branch), then norm(h)"""
    kind = dropping(drop)
    if kind == "drop path":
        return [Seam("drop path -> add", (drop_name,)), Seam(SUM_REUSED, (norm,), NO_KERNEL)]
    if kind is None:
        return [Seam(SUM_REUSED, (norm,))]
    return [Seam(f"{kind} -> {SUM_REUSED}", (drop_name, norm))]


def next_norm() -> Seam:
    """The sum of a block, which the norm of the next one reads."""
    return Seam(SUM_REUSED, (), NEXT_BLOCK)
