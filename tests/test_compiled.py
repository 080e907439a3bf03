"""What the compiler makes of the kernels, read without a GPU: fp64 stays fp64.

The kernels of the test process may be decorated for the interpreter, so compiling happens in a subprocess: this file,
run as a script, calls the public functions, compiles what they would launch, and prints what it reads in the code.
"""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

triton = pytest.importorskip("triton")

import fastreg.functional as F  # noqa: E402
from fastreg import ops, optim, penalties  # noqa: E402
from fastreg.averages import ExponentialMovingAverage  # noqa: E402
from fastreg.bench.sass import Kernel, _specialization  # noqa: E402
from fastreg.ops import backend  # noqa: E402
from fastreg.ops.fused import ACTIVATIONS  # noqa: E402

# -----------------------------------------------------------------------------------------------------------
# What is launched


def differentiated(function: Callable[..., Tensor], *tensors: Tensor | None) -> None:
    y = function(*(None if t is None else t.requires_grad_() for t in tensors))
    y.backward(torch.ones_like(y))


def operations(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """Every kernel that computes in ``dtype``, with what may be fused into it."""

    def tensors(*shapes: tuple[int, ...], last: bool = False) -> list[Tensor]:
        found = [torch.zeros(shape, dtype=dtype) for shape in shapes]
        return [t.to(memory_format=torch.channels_last) if last and t.dim() == 4 else t for t in found]

    def call(function, *shapes, last=False, **options):
        return lambda: differentiated(lambda *t: function(*t, **options), *tensors(*shapes, last=last))

    def dropout(x, bias=None, residual=None, **options):
        return F.dropout(x, 0.5, bias=bias, residual=residual, **options)

    def layer_norm(x, weight, bias, **options):
        return F.layer_norm(x, weight.shape, weight, bias, **options)

    def dropout_add_layer_norm(x, residual, weight, bias, **options):
        return F.dropout_add_layer_norm(x, residual, weight.shape, weight, bias, prenorm=True, **options)[0]

    def batch_norm(x, weight, bias, residual=None, training=True, **options):
        mean, var = torch.zeros_like(weight.detach()), torch.ones_like(weight.detach())
        return F.batch_norm(x, mean, var, weight, bias, training, residual=residual, **options)

    for activation in (None, *ACTIVATIONS):
        yield call(dropout, (40, 64), activation=activation)
    yield call(dropout, (40, 64), (64,), (40, 64), activation="gelu")
    yield call(dropout, (3, 5, 7, 7), (5, 1, 1), (3, 5, 7, 7), activation="gelu")
    yield call(F.alpha_dropout, (40, 64))
    yield call(F.feature_alpha_dropout, (4, 6, 7))
    for columns in (48, 768, 20_000):
        yield call(layer_norm, (9, columns), (columns,), (columns,), activation="gelu")
        yield call(dropout_add_layer_norm, (9, columns), (9, columns), (columns,), (columns,), p=0.5)
    for last in (False, True):
        for shape in ((4, 8, 6, 6), (64, 32, 28, 28)):
            parameters = (shape[1],), (shape[1],)
            for activation in (None, "relu", "gelu"):
                yield call(batch_norm, shape, *parameters, shape, last=last, activation=activation)
                yield call(
                    lambda x, w, b, **o: F.group_norm(x, 4, w, b, **o),
                    shape, *parameters, last=last, activation=activation,
                )  # fmt: skip
            yield call(batch_norm, shape, *parameters, last=last, training=False)
            yield call(lambda x, w, b: F.instance_norm(x, weight=w, bias=b), shape, *parameters, last=last)
        for beta in (0.5, 0.75):
            yield call(F.local_response_norm, (2, 8, 6, 6), last=last, size=5, beta=beta)
    yield call(F.gaussian_noise, (40, 64), std=0.1)
    yield call(F.gaussian_noise, (40, 64), std=0.1, mode="multiplicative")
    yield from optimizing(dtype)


def optimizing(dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    def parameters() -> list[nn.Parameter]:
        found = [nn.Parameter(torch.zeros(shape, dtype=dtype)) for shape in ((48, 64), (5, 5000), (7,))]
        for p in found:
            p.grad = torch.zeros_like(p)
        return found

    options = {"l1": 0.1, "max_norm": 1.0, "max_grad_norm": 1.0, "ema_decay": 0.9}
    for rule, own in (
        (optim.SGD, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}),
        (optim.AdamW, {"amsgrad": True, "cautious": True, "decouple_lr": True}),
    ):
        for further in ({}, options, options | {"max_norm_dim": 0, "l1_mode": "subgradient"}):
            yield lambda: rule(parameters(), lr=0.1, **own, **further).step()  # noqa: B023
    yield lambda: penalties.elastic_net(parameters(), 0.1, 0.1).backward()
    yield lambda: penalties.elastic_net(parameters(), 0.1, 0.1, accumulate=True)
    yield lambda: penalties.LaplacePrior(2.0, mean=0.1)(parameters()).backward()
    yield lambda: penalties.max_norm_(parameters(), 1.0)
    yield lambda: penalties.max_norm_(parameters(), 1.0, dim=0)
    yield lambda: ExponentialMovingAverage(nn.ParameterList(parameters()), 0.9).update()


def launched(dtype: torch.dtype) -> dict[str, Kernel]:
    """The variants that ``operations`` launch, each once. Nothing runs."""
    found: dict[str, Kernel] = {}

    def record(launch: backend.Launch, device: torch.device) -> None:
        function = launch.kernel.fn
        name = f"{function.__module__.rsplit('.', 1)[1]}.{function.__name__}"
        kernel = Kernel.of(name, launch, 1, 1)
        found.setdefault(f"{name} {kernel.arguments} {kernel.constants} {kernel.divisible_by_16}", kernel)

    backend.Launch.run = record
    backend.INTERPRETED = True  # tensors of the CPU go to the kernels
    for operation in operations(dtype):
        operation()
    return found


# -----------------------------------------------------------------------------------------------------------
# fp64


def front_end(kernel: Kernel) -> str:
    """The kernel as the compiler sees it first, before it has folded a constant."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", 90, 32)
    compiler = make_backend(target)
    options = compiler.parse_options({"num_warps": kernel.num_warps})
    context = ir.context()
    ir.load_dialects(context)
    compiler.load_dialects(context)
    functions, modules = compiler.get_codegen_implementation(options), compiler.get_module_map()
    source = ASTSource(**_specialization(kernel))
    return str(source.make_ir(target, options, functions, modules, context))


_FUNCTION = re.compile(r'(?:private|public) @"?(?:fastreg\.kernels\.)?([\w.]+?)(?:__|\(|")')
_CONSTANT = re.compile(r"(%[\w#]+) = arith\.constant (?:dense<)?([-+.\w]+)>? : (?:tensor<[\dx]+x)?f32")
_EXTENDED = re.compile(r"arith\.extf (%[\w#]+) : (?:tensor<[\dx]+x)?f32.* to ")


def extended(code: str) -> list[str]:
    """What is fp32 on its way to fp64: functions, each with a constant or "computed". Not those constants that fp16
    holds, which have lost nothing."""
    found = []
    for function in code.split("tt.func ")[1:]:
        name = _FUNCTION.match(function)[1]
        constants = dict(_CONSTANT.findall(function))
        values = [constants.get(operand, "computed") for operand in _EXTENDED.findall(function)]
        found += [f"{name}: {value}" for value in values if not _is_short(value)]
    return found


def _is_short(value: str) -> bool:
    if value == "computed":
        return False
    infinite_or_nan = value.startswith("0x")
    return infinite_or_nan or torch.tensor(float(value)).half().float() == torch.tensor(float(value))


# Random numbers are fp32, and step counters, as torch has them; signs are 1 and -1.
MEANT = {f"{name}: computed" for name in ("noise._tile", "advance", "channel_norm._load_signs")}


@pytest.fixture(scope="module")
def read() -> dict[str, dict[str, list[str]]]:
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    finished = subprocess.run(
        [sys.executable, __file__], env=environment, capture_output=True, text=True, timeout=600
    )
    assert finished.returncode == 0, finished.stderr
    return json.loads(finished.stdout)


def kernels() -> set[str]:
    """Those that ``fastreg.ops`` launches, as file.function."""
    found = set()
    for file in Path(ops.__file__).parent.glob("*.py"):
        names = re.findall(r"kernels\.(\w+)", file.read_text())
        kernels = re.search(r"from fastreg\.kernels import (\w+) as kernels", file.read_text())
        module = import_module(f"fastreg.kernels.{kernels[1]}") if kernels else None
        found |= {f"{kernels[1]}.{name}" for name in names if hasattr(getattr(module, name), "fn")}
    return found


# They leave fp64 to ATen, or move bytes.
NOT_FP64 = ("drop_connect", "dual_linear", "expectation", "noisy_linear", "averages.copy_if")


def test_every_kernel_is_read(read):
    assert {name.split()[0] for name in read["fp64"]} == {k for k in kernels() if not k.startswith(NOT_FP64)}


def test_fp64_stays_fp64(read):
    """``tl.fma`` and others of Triton make fp32 of a number that is written in the source, and only then fp64."""
    found = {value: name for name, values in read["fp64"].items() for value in values if value not in MEANT}
    assert not found


if __name__ == "__main__":
    print(json.dumps({"fp64": {name: extended(front_end(k)) for name, k in launched(torch.float64).items()}}))
