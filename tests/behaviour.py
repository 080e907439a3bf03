"""How every layer behaves under torch.compile, autocast, DDP, FSDP2, export and vmap: each cell of the table in
``docs/behaviour.md`` is what a function of this file found. ``PYTHONPATH=tests python -m behaviour`` writes the table.
"""

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from every_layer import LAYERS, Case
from shared import compilations, compiled
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call, vmap
from torch.nn.parallel import DistributedDataParallel
from torch.testing import assert_close

from fastreg.bench.report import markdown, replace_section

PAGE = Path(__file__).parent.parent / "docs/behaviour.md"


def is_random(case: Case) -> bool:
    return any(word in case.layer for word in ("Drop", "Nois"))


class Scaled(nn.Module):
    """A layer behind a parameter, for what wants one."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))
        self.layer = case.make()

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x * self.scale)


def made(case: Case) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Scaled(case), torch.randn(case.shape)


def trained(model: nn.Module, x: Tensor, call: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """The output of a training step and all gradients."""
    x = x.clone().requires_grad_()
    y = (model if call is None else call)(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in model.parameters())]


def compile(case: Case) -> str:
    """One graph for batches of all sizes, with the values and gradients of eager where nothing is random."""
    torch._dynamo.reset()
    model, x = made(case)
    step, counter = compiled(model, dynamic=True)
    for batch in (x, torch.cat([x, x])):
        found = trained(model, batch, step)
        model.zero_grad()
        expected = trained(model, batch)
        model.zero_grad()
        assert all(t.isfinite().all() for t in found)
        if not is_random(case):
            assert_close(found, expected, rtol=1e-4, atol=1e-5)
    graphs = compilations(counter)
    return "one graph" if graphs == 1 else f"{graphs} graphs"


def autocast(case: Case) -> str:
    """The dtype of the result for an fp32 input under autocast to bf16."""
    model, x = made(case)
    with torch.autocast("cpu", torch.bfloat16):
        y = model.layer(x)
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[y.dtype]


def second_derivatives(case: Case) -> str:
    model, x = made(case)
    x = x.double().requires_grad_()
    (gradient,) = torch.autograd.grad(model.double()(x).square().sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(gradient.sum(), x, allow_unused=True)
    assert second is None or second.isfinite().all()
    return "yes"


def ddp(case: Case) -> str:
    """A step as the only process has the gradients of the bare model."""
    model, x = made(case)
    torch.manual_seed(1)
    expected = trained(model, x)
    model.zero_grad()
    torch.manual_seed(1)
    try:
        wrapped = DistributedDataParallel(model)
    except ValueError as error:
        if "SyncBatchNorm layers only work with GPU modules" not in str(error):
            raise
        return "on GPUs alone, as torch's"
    assert_close(trained(model, x, wrapped), expected)
    return "yes"


def fsdp2(case: Case) -> str:
    """A step with sharded parameters has the gradients of the bare model."""
    model, x = made(case)
    torch.manual_seed(1)
    expected = trained(model, x)
    model.zero_grad()
    try:
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    except ValueError as error:
        if "scalar parameters" not in str(error):
            raise
        return "no: it shards no scalar, as sigma is"
    torch.manual_seed(1)
    found = trained(model, x)
    whole = [getattr(t, "full_tensor", lambda t=t: t)() for t in found]
    assert_close(whole, expected)
    return "yes"


def export(case: Case) -> str:
    """The exported layer computes the same in evaluation, for batches of any size, and draws anew in training."""
    model, x = made(case)
    sizes = ({0: torch.export.Dim("batch", min=2)},)
    exported = torch.export.export(model.eval(), (x,), dynamic_shapes=sizes).module()
    more = torch.cat([x, x])
    if not case.keywords.get("samples"):  # else evaluation is an average of draws
        assert_close(exported(more), model(more), rtol=1e-4, atol=1e-5)
    training = torch.export.export(model.train(), (x,)).module()
    if is_random(case):
        assert not training(x).equal(training(x))
        return "yes, draws anew"
    return "yes"


def batched(case: Case) -> str:
    """What ``vmap`` over three inputs draws for ``randomness`` of each kind."""
    model, x = made(case)
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    inputs = torch.stack([x] * 3)

    def call(x: Tensor) -> Tensor:
        return functional_call(model, state, (x,))

    if not is_random(case):
        if any("running" in name for name in state):  # they would be written by all at once, as torch says
            model.eval()
        assert_close(vmap(call)(inputs), torch.stack([call(x) for x in inputs]), rtol=1e-4, atol=1e-5)
        return "yes" if model.training else "in evaluation, as torch's"
    same, different = (vmap(call, randomness=kind)(inputs) for kind in ("same", "different"))
    assert_close(same[0], same[1], rtol=1e-4, atol=1e-5)  # products of batches sum in another order
    assert not torch.allclose(different[0], different[1], rtol=1e-4, atol=1e-5)
    try:
        vmap(call)(inputs)
    except RuntimeError as error:
        if "randomness" not in str(error):
            raise
        return "obeys randomness"
    raise AssertionError("vmap with randomness='error' did not refuse a random layer")


COLUMNS = {
    "torch.compile": compile,
    "autocast to bf16": autocast,
    "second derivatives": second_derivatives,
    "DDP": ddp,
    "FSDP2": fsdp2,
    "torch.export": export,
    "vmap": batched,
}


def line(name: str) -> list[str]:
    return [name, *(found(LAYERS[name]) for found in COLUMNS.values())]


def process_group(folder: str) -> None:
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # looking up the name of the machine may take seconds
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=0, world_size=1)


def table(names=tuple(LAYERS)) -> str:
    with tempfile.TemporaryDirectory() as folder:
        process_group(folder)
        try:
            return markdown(["layer", *COLUMNS], map(line, names), left=8)
        finally:
            dist.destroy_process_group()


if __name__ == "__main__":
    PAGE.write_text(replace_section(PAGE.read_text(), table(), "behaviour"))
