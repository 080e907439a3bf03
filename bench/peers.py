"""Who is compared: one entry for each implementation, found at run time, absent ones named with the reason.

A library that has an operation is one line here and one builder in the case that it competes in:
``Case(..., peers={"attorch": build})``.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from importlib import metadata

import torch

from .cases import Case


@dataclass(frozen=True)
class Peer:
    """``probe()`` returns the version or raises; ``build(case)`` returns the function to time, None where it
    has none.

    ``context()`` is held open while the peer is checked and timed. ``packages`` are what pip installs for it, of which
    there are wheels for Linux on x86-64 (a GPU machine without a network takes them from ``pip download``).
    """

    name: str
    probe: Callable[[], str]
    build: Callable[[Case], Callable | None]
    context: Callable[[], AbstractContextManager] = nullcontext
    packages: tuple[str, ...] = ()


def fastreg_version() -> str:
    import fastreg

    return fastreg.__version__


def library(name: str, *packages: str) -> Peer:
    """A library that takes part where a case has a builder for it under this name. The first of ``packages`` has its
    version, if its name differs."""
    distribution = packages[0].partition("==")[0] if packages else name
    return Peer(
        name,
        probe=lambda: metadata.version(distribution),
        build=lambda case: case.peers[name]() if name in case.peers else None,
        packages=packages,
    )


def compiled(mode: str | None) -> Callable[[Case], Callable]:
    def build(case: Case) -> Callable:
        # Timing backward alone runs it many times on one graph, which donated buffers forbid.
        torch._functorch.config.donated_buffer = False
        if case.compiled is not None:
            return case.compiled(mode)
        return torch.compile(case.torch, mode=mode, dynamic=False, fullgraph=True)

    return build


def use_gems() -> AbstractContextManager:
    import flag_gems

    return flag_gems.use_gems()


def torch_version() -> str:
    return torch.__version__


def plain_version() -> str:
    from .plain import available

    available()
    return fastreg_version()


# Max-autotune without its CUDA graphs: the harness replays every implementation from a graph where launches
# matter.
PEERS = (
    Peer("fastreg", fastreg_version, lambda case: case.ours),
    Peer("torch", torch_version, lambda case: case.torch),
    Peer("compile", torch_version, compiled(None)),
    Peer("compile-max", torch_version, compiled("max-autotune-no-cudagraphs")),
    # FlagGems replaces ATen's operators, so it runs the plain PyTorch expression of every case.
    Peer(
        "flag_gems",
        lambda: metadata.version("flag_gems"),
        lambda case: case.torch,
        use_gems,
        ("flag-gems==5.0.2", "sqlalchemy==2.0.48", "PyYAML==6.0.3"),
    ),
    # The same algorithms as on a board (kernels/plain): the ratio to them is what tuning bought.
    Peer("plain", plain_version, lambda case: case.peers["plain"]() if "plain" in case.peers else None),
    library("attorch"),  # no package: from its repository
    library("transformer_engine"),  # its wheel has no PyTorch part: it is built on the machine
    library("liger_kernel", "liger-kernel==0.8.5"),
    library("quack", "quack-kernels==0.6.5", "nvidia-cutlass-dsl", "apache-tvm-ffi", "torch-c-dlpack-ext"),
    library("apex"),  # from its repository
    library("optimi", "torch-optimi==0.3.3"),
    library("torchao", "torchao==0.18.0"),
    library("bitsandbytes", "bitsandbytes==0.50.2"),
    library("flash_attn"),  # no wheel: it is built on the machine
)
CPU_PEERS = ("fastreg", "torch")  # what a CPU can say something about: the overhead over torch


def select(names: tuple[str, ...] = (), table: tuple[Peer, ...] = PEERS) -> tuple[list[Peer], dict[str, str]]:
    """The peers that are here (of ``names``, all if empty), and for every one asked for its version or why
    not."""
    found, versions = [], {}
    if unknown := set(names) - {peer.name for peer in table}:
        raise ValueError(f"unknown peers: {', '.join(sorted(unknown))}")
    for peer in table:
        if names and peer.name not in names:
            continue
        try:
            versions[peer.name] = peer.probe()
            found.append(peer)
        except Exception as error:  # a broken install is an absent peer, not the end of the run
            versions[peer.name] = f"absent: {type(error).__name__}: {error}"
    return found, versions
