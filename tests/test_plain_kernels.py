"""The plain kernels (``kernels/plain``) equal torch, and the tuned kernels with the same seed; they compile for sm_90.

Three references in one: where the plain kernel and torch agree, and the tuned kernel differs, the tuned one is wrong.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as TF
from machine_option import TARGET
from shared import near, needs_triton

import fastreg.functional as F
from fastreg import optim, penalties, random
from fastreg.averages import ExponentialMovingAverage
from fastreg.ops import backend
from fastreg.random import Stream

pytestmark = needs_triton
if backend.HAS_TRITON:
    from fastreg.bench import plain

SEED = 0x123456789ABCDEF
TOLERANCE = 2e-6  # fp32: sums of some hundred terms near 1


def leaves(device, *shapes, dtype=torch.float32):
    return [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for shape in shapes]


def agree(functions, tensors, tolerance=TOLERANCE) -> None:
    """All functions have one value and one gradient for each tensor."""
    results = []
    for function in functions:
        y = function(*tensors)
        dy = torch.linspace(-1, 2, y.numel(), device=y.device, dtype=y.dtype).view_as(y)
        results.append((y, *torch.autograd.grad(y, tensors, dy)))
    for others in zip(*results, strict=True):
        for other in others[1:]:
            assert (other.shape, other.dtype) == (others[0].shape, others[0].dtype)
            near(others[0], other.detach(), tolerance)


@pytest.mark.smoke
@pytest.mark.parametrize(("p", "shape"), [(0.5, (3, 37)), (0.1, (1, 8)), (0.9, (5, 1))])
def test_dropout(device, p, shape):
    (x,) = leaves(device, shape)
    keep = random.keep_mask(shape, p, Stream(SEED), device)
    kept = (65536 - random.threshold(p)) / 65536
    definition = lambda x: torch.where(keep, x, 0.0) / kept  # noqa: E731
    agree([lambda x: plain.dropout(x, p, SEED), definition, lambda x: F.dropout(x, p, seed=SEED)], [x])


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(3, 37), (2, 5, 8), (1, 1)])
def test_layer_norm(device, shape):
    size = shape[-1:]
    tensors = leaves(device, shape, size, size)
    agree(
        [
            plain.layer_norm,
            lambda x, w, b: TF.layer_norm(x, size, w, b),
            lambda x, w, b: F.layer_norm(x, size, w, b),
        ],
        tensors,
        2e-5,
    )


def test_rms_norm(device):
    tensors = leaves(device, (3, 37), (37,))
    agree([plain.rms_norm, lambda x, w: TF.rms_norm(x, (37,), w, 1e-5)], tensors, 1e-5)


@pytest.mark.smoke
@pytest.mark.parametrize("shape", [(3, 6, 5, 3), (4, 6)])
def test_batch_norm(device, shape):
    tensors = leaves(device, shape, (6,), (6,))
    by_torch, tuned = (lambda x, w, b, f=f: f.batch_norm(x, None, None, w, b, training=True) for f in (TF, F))
    agree([plain.batch_norm, by_torch, tuned], tensors, 2e-5)


@pytest.mark.parametrize("groups", [1, 2, 6])
def test_group_norm(device, groups):
    tensors = leaves(device, (2, 6, 5, 3), (6,), (6,))
    by_torch, tuned = (lambda x, w, b, f=f: f.group_norm(x, groups, w, b) for f in (TF, F))
    agree([lambda x, w, b: plain.group_norm(x, groups, w, b), by_torch, tuned], tensors, 2e-5)


@pytest.mark.parametrize(("size", "beta"), [(3, 0.75), (4, 0.5), (5, 1.0)])
def test_local_response_norm(device, size, beta):
    (x,) = leaves(device, (2, 7, 3, 3))
    numbers = (size, 0.5, beta, 2.0)
    agree([lambda x, f=f: f.local_response_norm(x, *numbers) for f in (plain, TF, F)], [x], 5e-6)


@pytest.mark.parametrize("p", [0.5, 0.25])
def test_drop_connect_linear(device, p):
    tensors = leaves(device, (17, 9), (2, 9), (2,))
    chance = random.chance(p)
    mask = random.connection_mask(torch.arange(17, device=device), 2, 9, chance, Stream(SEED))

    def definition(v, weight, bias):
        return torch.einsum("bnk,nk,bk->bn", mask.to(v.dtype), weight, v) / chance.probability + bias

    forms = [lambda *t, f=f: f(*t, p, seed=SEED) for f in (plain.drop_connect_linear, F.drop_connect_linear)]
    agree([*forms, definition], tensors, 5e-6)


@pytest.mark.parametrize("mode", ["additive", "multiplicative"])
def test_gaussian_noise(device, mode):
    if TARGET is not None:
        pytest.skip("tl.sin takes an instruction that the machine does not have: mad.lo.cc")
    (x,) = leaves(device, (3, 37))
    eps = random.normal((3, 37), Stream(SEED), device=device)
    definition = {"additive": lambda x: x + 0.5 * eps, "multiplicative": lambda x: x * (1 + 0.5 * eps)}
    forms = [lambda x, f=f: f.gaussian_noise(x, 0.5, mode=mode, seed=SEED) for f in (plain, F)]
    agree([*forms, definition[mode]], [x], 4e-5)  # normals by approximate functions: see test_random.py


@pytest.mark.smoke
@pytest.mark.parametrize(("l1", "l2"), [(0.1, 0.0), (0.0, 0.1), (0.3, 0.2)])
def test_elastic_net(device, l1, l2):
    (p,) = leaves(device, (31, 70))
    definition = lambda p: l1 * p.abs().sum() + l2 / 2 * p.square().sum()  # noqa: E731
    agree([lambda p, f=f: f.elastic_net(p, l1, l2) for f in (plain, penalties)] + [definition], [p])


def test_max_norm(device):
    p = torch.randn(9, 20, device=device)
    found, tuned = p.clone(), torch.nn.Parameter(p.clone())
    plain.max_norm_rows_(found, 4.0)
    penalties.max_norm_([tuned], 4.0, dim=0)
    near(found, p.renorm(2, 0, 4.0), TOLERANCE)
    near(found, tuned.detach(), TOLERANCE)
    assert torch.equal(found[p.norm(dim=1) < 3.99], p[p.norm(dim=1) < 3.99])


def test_average(device):
    model = torch.nn.Linear(40, 30).to(device)
    tuned = ExponentialMovingAverage(model, 0.9)
    found = model.weight.detach().clone()
    torch.nn.init.normal_(model.weight)
    expected = 0.9 * found + 0.1 * model.weight.detach()
    plain.follow_(found, model.weight.detach(), 0.9)
    tuned.update()
    near(found, expected, TOLERANCE)
    near(found, tuned.tensors["weight"], TOLERANCE)


STEPS = {
    "SGD": ({"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}, torch.optim.SGD),
    "AdamW": ({"lr": 0.1, "weight_decay": 0.1, "betas": (0.8, 0.9)}, torch.optim.AdamW),
}


@pytest.mark.smoke
@pytest.mark.parametrize("name", STEPS)
def test_optimizers(device, name):
    arguments, torchs = STEPS[name]
    start = torch.randn(43, 29, device=device)
    results = []
    for cls in (getattr(plain, name), torchs, getattr(optim, name)):
        p = torch.nn.Parameter(start.clone())
        optimizer = cls([p], **arguments)
        for step in range(3):
            p.grad = torch.linspace(-1, 1 + step, p.numel(), device=device).view_as(p)
            optimizer.step()
        results.append(p.detach())
    near(results[0], results[1], 1e-5)
    near(results[0], results[2], 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bits_are_rounded_once(device, dtype):
    """To 2^-11 and 2^-8; the interpreter cuts off."""
    tensors = [t.detach().requires_grad_() for t in leaves(device, (3, 37), (37,), (37,), dtype=dtype)]
    exact = TF.layer_norm(tensors[0].double(), (37,), *(t.double() for t in tensors[1:]))
    near(plain.layer_norm(*tensors), exact.detach(), torch.finfo(dtype).eps)


@pytest.mark.slow  # CI compiles the launches of this file by ``compile_only``, with the oldest Triton
def test_they_compile_for_an_h100():
    """The interpreter takes what the compiler refuses."""
    if TARGET is not None or not backend.INTERPRETED:
        pytest.skip("they are compiled here")
    environment = os.environ | {"TRITON_INTERPRET": "0", "PYTHONPATH": os.path.dirname(__file__)}
    command = [sys.executable, "-m", "pytest", "-n", "0", "-p", "compile_only", "-p", "no:cacheprovider"]
    command += ["-k", "not compile and not bits", "-m", "", "-q", __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]


def test_they_are_timed_as_a_peer():
    """In every family that has one, on its own inputs, with the check that every peer has to pass."""
    from fastreg.bench import FAMILIES
    from fastreg.bench.__main__ import cases_of
    from fastreg.bench.harness import wrong

    found = {}
    for family in FAMILIES:
        for case in cases_of(family, []):
            if "plain" in case.peers and "4096" not in case.name and "tensors of 64" not in case.name:
                found.setdefault(family, case)
    assert {*FAMILIES} - {*found} == {"dual_linear", "noisy_linear"}  # products of matrices
    for family in ("dropout", "averages", "optimizers", "penalties", "layer_norm"):
        case = found[family]
        assert (
            wrong(case, case.peers["plain"](), case.inputs(2048, torch.float32, torch.device("cpu"))) is None
        )


# --- dropout in steps -------------------------------------------------------------------------------------

STEPS_OF_DROPOUT = (
    "tiled",
    "shared_calls",
    "wide_products",
    "lanes_in_place",
    "selected_first",
    "full_tiles",
)


@pytest.mark.parametrize("name", STEPS_OF_DROPOUT)
def test_every_step_from_plain_to_tuned_has_one_mask(device, name):
    from fastreg.kernels.plain import dropout_in_steps as steps

    x, block = torch.randn(2, 64, device=device), 64
    y = torch.empty_like(x)
    size = () if name == "full_tiles" else (x.numel(),)
    plain.run(getattr(steps, name), (2,), x, y, SEED, random.threshold(0.3), 1 / 0.7, *size, BLOCK=block)
    near(y, F.dropout(x, 0.3, seed=SEED), 1e-4)  # the scale is that of 0.3, not of round(0.3 2^16) / 2^16
    assert torch.equal(y == 0, F.dropout(x, 0.3, seed=SEED) == 0)


@pytest.mark.slow
def test_the_readme_of_the_kernels_has_the_counts_of_today():
    import triton

    page = (Path(__file__).parent.parent / "kernels/README.md").read_text()
    if f"with Triton {triton.__version__}," not in page:
        pytest.skip("the table is that of another Triton")
    environment = os.environ | {"TRITON_INTERPRET": "0", "COLUMNS": "1000"}
    command = [sys.executable, "-m", "bench", "lesson"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=300)
    assert done.stdout.strip() in page
