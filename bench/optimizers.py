"""Steps of optimizers: one large parameter, very many tiny ones, and everything that a step can do in one pass."""

from collections.abc import Callable
from functools import partial
from importlib import import_module

import torch
from torch import Tensor, nn

from fastreg import optim
from fastreg.ops.backend import Launch
from fastreg.ops.multi_tensor import optimizers as ops
from fastreg.ops.multi_tensor.optimizers import Batch, Member, Rule

from .cases import TOLERANCE, Case
from .executed import absent, zeros
from .sass import Budget, Kernel, short_name

LR, DECAY, BETAS, EPS = 1e-3, 0.1, (0.9, 0.95), 1e-8


class Stepped:
    """A function of parameters and gradients that takes a step on copies of them, and returns the parameters.

    ``make(parameters)`` returns the call that steps. The optimizer is made at the first call on some memory: what is
    timed is one of the steps after that.
    """

    def __init__(self, make: Callable[[list[nn.Parameter]], Callable[[], object]]) -> None:
        self.make, self.memory = make, None

    def __call__(self, p: Tensor, g: Tensor) -> Tensor:
        memory = p.data_ptr(), g.data_ptr(), p.shape
        if memory != self.memory:
            self.memory, self.values = memory, p.detach().clone()
            parameters = [nn.Parameter(part) for part in tensors(self.values)]
            for parameter, gradient in zip(parameters, tensors(g.clone()), strict=True):
                parameter.grad = gradient
            self.step = self.make(parameters)
        self.step()
        return self.values


def tensors(x: Tensor) -> list[Tensor]:
    """The tensor itself, or one for each of its rows where it has two dimensions of which the last is small."""
    return list(x) if x.dim() == 2 and x.shape[1] == TINY else [x]


TINY = 64


def large(numel: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A parameter of rows of 1024, and its gradient."""
    shape = (max(1, numel // 1024), min(numel, 1024))
    return tuple(torch.randn(shape, dtype=dtype, device=device) for _ in range(2))


def tiny(numel: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """As many tensors of 64 elements, 10,000 at most."""
    shape = (min(10_000, max(1, numel // TINY)), TINY)
    return tuple(torch.randn(shape, dtype=dtype, device=device) for _ in range(2))


ADAM_ARGUMENTS = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY}
SGD_ARGUMENTS = {"lr": LR, "momentum": 0.9, "weight_decay": DECAY}
RADIUS, CLIP, EMA = 20.0, 1.0, 0.999  # of the options


def recordable(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """On a GPU its step can be recorded in a CUDA graph, as the harness does: it counts its steps there."""
    for group in optimizer.param_groups:
        if "capturable" in group:
            group["capturable"] = group["params"][0].is_cuda
    return optimizer


def stepping(cls: type, **arguments) -> Stepped:
    return Stepped(lambda parameters: recordable(cls(parameters, **arguments)).step)


def separately(parameters: list[nn.Parameter]) -> Callable[[], None]:
    """What all of it takes with torch: clipping, the fused step, a projection, an average."""
    optimizer = recordable(torch.optim.AdamW(parameters, **ADAM_ARGUMENTS, fused=True))
    averages = [p.detach().clone() for p in parameters]

    @torch.no_grad()
    def step() -> None:
        nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        for p in parameters:
            if p.dim() > 1:
                p.renorm_(2, 0, RADIUS)
        torch._foreach_lerp_(averages, parameters, 1 - EMA)

    return step


def elsewhere(module: str, name: str, **arguments) -> Callable[[], Stepped]:
    """A builder of the step of another library."""
    return lambda: stepping(getattr(import_module(module), name), **arguments)


def compiled(theirs: Callable[[list[nn.Parameter]], Callable]) -> Callable[[str | None], Stepped]:
    """The step alone is compiled, as torch's documentation has it: not fullgraph, its hooks break the graph."""
    return lambda mode: Stepped(
        lambda parameters: torch.compile(theirs(parameters), mode=mode, dynamic=False)
    )


def stepped(reference: Callable[[Tensor, Tensor], Tensor]):
    """The check of a first step, in fp64, at both ends (2^20 elements each): elements do not know of each other."""

    def check(inputs, y, dy, grads) -> str | None:
        p, g = inputs
        if y.shape != p.shape or y.dtype != p.dtype:
            return f"output is {tuple(y.shape)} {y.dtype}, parameter {tuple(p.shape)} {p.dtype}"
        count = max(1, 2**20 // p.shape[1])
        for part in (slice(count), slice(-count, None)):
            expected = reference(p[part].double(), g[part].double() * gain(g))
            wrong = ~torch.isclose(
                y[part].double(), expected, rtol=TOLERANCE[p.dtype], atol=TOLERANCE[p.dtype] / 10
            )
            if wrong.any():
                return f"{int(wrong.sum())} of {wrong.numel()} elements differ from the reference"
        return None

    gain = getattr(reference, "gain", lambda g: 1.0)
    return check


def adamw(p: Tensor, g: Tensor) -> Tensor:
    """The first step: the corrected moments are g and g^2."""
    return p * (1 - LR * DECAY) - LR * g / (g.abs() + EPS)


def sgd(p: Tensor, g: Tensor) -> Tensor:
    return p - LR * (g + DECAY * p)


def everything(p: Tensor, g: Tensor) -> Tensor:
    p = adamw(p, g)
    return p * (RADIUS / p.norm(dim=1, keepdim=True)).clamp(max=1)


everything.gain = lambda g: min(1.0, CLIP / float(g.norm(dtype=torch.float64)))

_THEIRS = {"fused": True}
CASES = (
    Case(
        "AdamW",
        large,
        ours=stepping(optim.AdamW, **ADAM_ARGUMENTS),
        torch=stepping(torch.optim.AdamW, **ADAM_ARGUMENTS, **_THEIRS),
        forward_bytes=lambda e: 7 * e,  # read p, g, m, v; write p, m, v
        backward_bytes=lambda e: 0,
        check=stepped(adamw),
        compiled=compiled(
            lambda parameters: recordable(torch.optim.AdamW(parameters, **ADAM_ARGUMENTS)).step
        ),
        peers={
            "plain": elsewhere("fastreg.bench.plain", "AdamW", **ADAM_ARGUMENTS),
            "apex": elsewhere("apex.optimizers", "FusedAdam", adam_w_mode=True, **ADAM_ARGUMENTS),
            "optimi": elsewhere("optimi", "AdamW", triton=True, **ADAM_ARGUMENTS),
            "torchao": elsewhere("torchao.optim", "_AdamW", **ADAM_ARGUMENTS),
            "bitsandbytes": elsewhere("bitsandbytes.optim", "AdamW", **ADAM_ARGUMENTS),
        },
    ),
    Case(
        "SGD, momentum",
        large,
        ours=stepping(optim.SGD, **SGD_ARGUMENTS),
        torch=stepping(torch.optim.SGD, **SGD_ARGUMENTS, **_THEIRS),
        forward_bytes=lambda e: 5 * e,  # read p, g, m; write p, m
        backward_bytes=lambda e: 0,
        check=stepped(sgd),
        compiled=compiled(lambda parameters: torch.optim.SGD(parameters, **SGD_ARGUMENTS).step),
        peers={"plain": elsewhere("fastreg.bench.plain", "SGD", **SGD_ARGUMENTS)},
    ),
    Case(
        "AdamW, tensors of 64",
        tiny,
        ours=stepping(optim.AdamW, **ADAM_ARGUMENTS),
        torch=stepping(torch.optim.AdamW, **ADAM_ARGUMENTS, **_THEIRS),
        forward_bytes=lambda e: 7 * e,
        backward_bytes=lambda e: 0,
        check=stepped(adamw),
    ),
    Case(
        "AdamW, clip, max-norm, EMA",
        large,
        ours=stepping(
            optim.AdamW, **ADAM_ARGUMENTS, max_grad_norm=CLIP, max_norm=RADIUS, max_norm_dim=0, ema_decay=EMA
        ),
        torch=Stepped(separately),
        forward_bytes=lambda e: 8 * e + 8,  # g is read twice; the average, of fp32, is read and written
        backward_bytes=lambda e: 0,
        check=stepped(everything),
    ),
)

ADAM = Rule(adam=True, momentum=True)
SGD = Rule(adam=False, momentum=True)

# -----------------------------------------------------------------------------------------------------------
# What ``fastreg inspect`` compiles

SIZE = 1 << 27  # elements of one parameter


def kernels() -> list[Kernel]:
    """Whole tiles at aligned addresses: the others are loops of no turn."""
    fp32, bf16, fp64 = torch.float32, torch.bfloat16, torch.float64
    found = [
        variant("AdamW", ADAM, fp32, headline=True),
        variant("AdamW, clip, EMA", ADAM._replace(average=True), fp32, headline=True),
        variant("AdamW", ADAM, bf16, headline=True),
        variant("AdamW, random rounding", ADAM._replace(at_random=True), bf16),
        variant("AdamW, masters", ADAM._replace(master=True), bf16, moments=fp32),
        variant(
            "AdamW, everything",
            ADAM._replace(amsgrad=True, cautious=True, average=True),
            fp32,
            everything=True,
        ),
        variant("AdamW", ADAM, fp64),
        variant("SGD, momentum", SGD, fp32, headline=True),
        variant("SGD, momentum", SGD._replace(nesterov=True), bf16, everything=True),
        variant("SGD", SGD._replace(momentum=False), fp32),
        variant("AdamW, max-norm of rows of 512", ADAM._replace(rows=True), fp32, row=512),
        variant("AdamW, max-norm of rows of 4096", ADAM._replace(rows=True), fp32, row=4096),
        variant("AdamW, max-norm of rows of 4096", ADAM._replace(rows=True, at_random=True), bf16, row=4096),
        variant("AdamW, max-norm of the tensor", ADAM._replace(rows=False), fp32),
    ]
    for dtype in (fp32, bf16):
        budget = Budget(**SCALARS, shared_bytes=64)
        name = f"{short_name(dtype)} squares of gradients"
        found += [declared(name, partial(launch_of, squares, ADAM, dtype), dtype.itemsize, budget)]
    projection = partial(launch_of, project, ADAM._replace(rows=False), fp32)
    return [
        *found,
        declared("fp32 projection of the tensor", projection, 2 * fp32.itemsize, Budget(**UNROLLED)),
    ]


# The tables of a program: what it works on, its addresses, its numbers; and partial sums.
SCALARS = {"narrow_loads": 28, "narrow_stores": 2}
# The assembler unrolls the tail of short kernels, and leaves a part of it outside of the loop.
UNROLLED = {"narrow_loads": 48, "narrow_stores": 8}
# Accesses of 16 bytes are four elements a thread to one type and eight to the other; and sums over rows.
EXCHANGED = 8192


def budget_of(rule: Rule, dtype: torch.dtype) -> Budget:
    exchanges = EXCHANGED if rule.master or rule.rows is not None else 0
    short = not rule.adam and dtype == torch.float32
    # Philox and a sum over rows in 14 bytes: about as long as the memory of a B200.
    least = {80: 1, 90: 1, 100: 0.95} if rule.at_random and rule.rows else 1
    return Budget(**(UNROLLED if short else SCALARS), shared_bytes=exchanges, min_headroom=least)


def squares(batch: Batch) -> Launch:
    return ops.squares_launches(batch.table.entries, batch.table.chunks, batch.partials, batch.form)[0]


def step(batch: Batch, everything: bool) -> Launch:
    """everything: with coupled penalties and proximal L1."""
    tables = batch.table.entries, batch.table.chunks
    return ops.step_launches(*tables, batch.scalars, batch.partials, everything, everything, batch.form)[0]


def project(batch: Batch) -> Launch:
    tables = batch.table.entries, batch.table.chunks
    return ops.project_launches(*tables, batch.chunk_units, batch.scalars, batch.squared, batch.form)[0]


def launch_of(stage, rule, dtype, memory, moments=None, row=0):
    """A stage of a batch, and the tensors that its table points to."""

    def like(dtype, wanted=True):
        shape = (SIZE // row, row) if row else (SIZE,)
        return memory(*shape, dtype=dtype) if wanted else None

    wide = ops.compute_dtype(dtype)
    member = Member(
        like(dtype),
        like(dtype),
        like(moments or dtype, rule.momentum),
        like(moments or dtype, rule.adam),
        like(moments or dtype, rule.amsgrad),
        like(wide, rule.master),
        like(wide, rule.average),
        memory(dtype=torch.float32),
    )
    batch = Batch(rule, [member])
    batch.scalars.fill_(1.0)  # the step is taken
    if batch.form.projection == "partial":
        batch.squared.fill_(4.0)  # outside of the ball
    return stage(batch), [x for x in vars(member).values() if isinstance(x, Tensor)]


def declared(name, launch, bytes_per_element, budget, **rest) -> Kernel:
    rest |= {"trips": 0, "budget": budget, "real": partial(launch, memory=zeros)}
    return Kernel.of(name, launch(memory=absent)[0], SIZE, bytes_per_element, **rest)


def variant(name, rule, dtype, *, moments=None, row=0, everything=False, headline=False) -> Kernel:
    stage = partial(step, everything=everything)
    launch = partial(launch_of, stage, rule, dtype, moments=moments, row=row)
    budget, bytes_ = budget_of(rule, dtype), bytes_of(rule, dtype, moments or dtype)
    return declared(f"{short_name(dtype)} {name}", launch, bytes_, budget, headline=headline)


def bytes_of(rule: Rule, dtype: torch.dtype, moments: torch.dtype) -> int:
    """An element: gradients are read, parameters and state read and written; beside a master, p is written only."""
    wide = ops.compute_dtype(dtype).itemsize
    states = (rule.momentum + rule.adam + rule.amsgrad) * moments.itemsize
    parameter = dtype.itemsize + 2 * wide if rule.master else 2 * dtype.itemsize
    return dtype.itemsize + parameter + 2 * states + 2 * wide * rule.average
