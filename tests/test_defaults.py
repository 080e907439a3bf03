"""Results do not depend on ``torch.set_default_dtype`` and ``torch.set_default_device``.

Every case says the dtype and the device of what it makes, as a user does who has changed the defaults for something
else. So each has to give the same bits, dtypes and devices whatever they are: a difference is a tensor of ours, made
somewhere inside without its dtype or device.
"""

import ast
import functools
import itertools
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import fastreg
import fastreg.functional as F
import fastreg.nn as fnn
from fastreg import averages, optim, penalties, random
from fastreg.optim.options import OPTIONS
from fastreg.random import Stream

CPU = torch.device("cpu")
STREAM = Stream(7, 3)


def tensor(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = True) -> Tensor:
    generator = torch.Generator("cpu").manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64, device=CPU)
    return x.to(dtype).requires_grad_(grad)


def positive(*shape: int) -> Tensor:
    return tensor(*shape, seed=9, grad=False).square() + 0.5


def with_gradients(function, *inputs, **keywords):
    """Results, and the gradients of first and second order of the tensors that want one."""
    y = function(*inputs, **keywords)
    wanted = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if not wanted or not y.requires_grad:
        return [y]
    weights = tensor(*y.shape, seed=5, dtype=y.dtype, grad=False)
    first = torch.autograd.grad(y, wanted, weights, create_graph=True, allow_unused=True)
    smooth = [g for g in first if g is not None and g.requires_grad]
    second = (
        torch.autograd.grad([g.square().sum() for g in smooth], wanted, allow_unused=True) if smooth else ()
    )
    return [y, *first, *second]


CASES = {}


def case(*names: str):
    """A case, and the public names that it covers."""

    def added(function):
        CASES[function.__name__] = function, names
        return function

    return added


# --- functions --------------------------------------------------------------------------------------------


def fused(x: Tensor) -> dict:
    return {"activation": "gelu", "residual": tensor(*x.shape, seed=4, grad=False)}


@case("dropout", "dropout1d", "dropout2d", "dropout3d", "drop_path")
def dropouts():
    found = []
    for name, shape in (
        ("dropout", (5, 7)),
        ("dropout1d", (3, 4, 5)),
        ("dropout2d", (3, 4, 2, 3)),
        ("dropout3d", (2, 3, 2, 2, 2)),
        ("drop_path", (5, 3)),
    ):
        function = getattr(F, name)
        for p, seed in ((0.3, 7), (0.3, None), (1.0, 7), (0.0, None)):
            for dtype in (torch.float32, torch.bfloat16):
                x = tensor(*shape, dtype=dtype)
                found += with_gradients(function, x, p=p, seed=seed)
        x = tensor(*shape)
        found += with_gradients(function, x, p=0.3, seed=7, **fused(x))
        found += with_gradients(function, x, p=0.3, seed=7, inverted=False)
        found += with_gradients(function, x, p=0.3, training=False, inverted=False)
    bias = tensor(7, seed=2)
    found += with_gradients(
        lambda x, b: F.dropout(x, 0.3, bias=b, activation="relu", seed=3), tensor(5, 7), bias
    )
    return found


@case("alpha_dropout", "feature_alpha_dropout")
def alpha_dropouts():
    found = []
    for function in (F.alpha_dropout, F.feature_alpha_dropout):
        for seed in (7, None):
            found += with_gradients(function, tensor(5, 4, 3), p=0.3, training=True, seed=seed)
    return found


@case("gaussian_noise")
def noise():
    found = []
    for mode in ("additive", "multiplicative"):
        for seed in (7, None):
            for dtype in (torch.float32, torch.float16, torch.float64):
                found += with_gradients(
                    F.gaussian_noise, tensor(5, 7, dtype=dtype), std=0.3, mode=mode, seed=seed
                )
    return found


@case("noisy_linear")
def noisy_linear():
    found = []
    for mode in ("additive", "multiplicative", "factorised"):
        for seed in (7, None):
            inputs = tensor(4, 3), tensor(5, 3, seed=1), tensor(5, seed=2)
            found += with_gradients(F.noisy_linear, *inputs, sigma=0.3, mode=mode, seed=seed)
            found += with_gradients(
                F.noisy_linear, *inputs, sigma=0.3, mode=mode, seed=seed, activation="relu"
            )
    sigma, bias_sigma = positive(1).requires_grad_(), positive(1)
    found += with_gradients(
        lambda v, w, s: F.noisy_linear(v, w, None, s, bias_sigma=bias_sigma, seed=3),
        tensor(4, 3),
        tensor(5, 3, seed=1),
        sigma,
    )
    return found


@case("drop_connect_linear")
def drop_connect_linear():
    found = []
    inputs = tensor(4, 3), tensor(5, 3, seed=1), tensor(5, seed=2)
    for mode in ("example", "group", "batch", "flipout", "gaussian"):
        size = 2 if mode == "group" else None
        for seed in (7, None):
            for inverted in (True, False):
                found += with_gradients(
                    F.drop_connect_linear, *inputs, mode=mode, group_size=size, seed=seed, inverted=inverted
                )
    return found


@case("drop_connect_linear")
def drop_connect_inference():
    found = []
    inputs = tensor(4, 3), tensor(5, 3, seed=1), tensor(5, seed=2)
    for activation in ("relu", "leaky_relu", "gelu", "elu", "hardswish", "tanh", "silu"):
        for seed in (7, None):
            found += with_gradients(
                F.drop_connect_linear, *inputs, training=False, activation=activation, samples=5, seed=seed
            )[:4]
    for inference, activation in (("mean", "relu"), ("probit", "sigmoid")):
        found += with_gradients(
            F.drop_connect_linear, *inputs, training=False, activation=activation, inference=inference
        )
    return found


@case("batch_norm", "group_norm", "instance_norm")
def norms():
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        parameter = torch.promote_types(dtype, torch.float32)
        x = tensor(3, 4, 5, 2, dtype=dtype)
        for more in ({}, fused(x)):
            w, b = tensor(4, seed=1, dtype=parameter), tensor(4, seed=2, dtype=parameter)
            running = [tensor(4, seed=3, dtype=parameter, grad=False), positive(4).to(parameter)]
            for training in (True, False):
                found += with_gradients(F.batch_norm, x, *running, w, b, training, **more)[:4]
                found += running
            found += with_gradients(F.group_norm, x, 2, w, b, **more)[:4]
            found += with_gradients(F.instance_norm, x, *running, w, b, **more)[:4]
            found += running
    return found


@case("sync_batch_norm")
def sync_batch_norm_of_one_process():
    running = [tensor(4, grad=False), positive(4)]
    return [F.sync_batch_norm(tensor(5, 4), *running, training=True), *running]


@case("batch_norm")
def batch_norm_with_a_momentum_in_memory():
    running = [tensor(4, grad=False), positive(4)]
    momentum = torch.full((), 0.3, dtype=torch.float32, device=CPU)
    return [F.batch_norm(tensor(5, 4), *running, training=True, momentum=momentum), *running]


@case("layer_norm", "dropout_add_layer_norm", "local_response_norm")
def layer_norms():
    found = []
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        parameter = torch.promote_types(dtype, torch.float32)
        w, b = tensor(7, seed=1, dtype=parameter), tensor(7, seed=2, dtype=parameter)
        x, r = tensor(5, 7, dtype=dtype), tensor(5, 7, seed=3, dtype=dtype)
        for more in ({}, {"activation": "gelu", "residual": r}):
            found += with_gradients(F.layer_norm, x, (7,), w, b, **more)
        for seed in (7, None):
            found += with_gradients(F.dropout_add_layer_norm, x, r, (7,), w, b, p=0.3, seed=seed)
        found += with_gradients(F.local_response_norm, tensor(2, 5, 3, dtype=dtype), size=3)
    return found


# --- modules ----------------------------------------------------------------------------------------------

HERE = {"device": CPU, "dtype": torch.float32}
MODULES = {
    "AlphaDropout": lambda: (fnn.AlphaDropout(0.3), (5, 4)),
    "BatchNorm1d": lambda: (fnn.BatchNorm1d(4, **HERE), (5, 4)),
    "BatchNorm2d": lambda: (fnn.BatchNorm2d(4, activation="relu", **HERE), (5, 4, 3, 2)),
    "BatchNorm3d": lambda: (fnn.BatchNorm3d(4, momentum=None, **HERE), (3, 4, 3, 2, 2)),
    "DropConnectConv2d": lambda: (fnn.DropConnectConv2d(4, 3, 2, p=0.3, **HERE), (2, 4, 3, 3)),
    "DropConnectLinear": lambda: (fnn.DropConnectLinear(4, 3, activation="tanh", samples=5, **HERE), (5, 4)),
    "DropPath": lambda: (fnn.DropPath(0.3), (5, 4)),
    "Dropout": lambda: (fnn.Dropout(0.3), (5, 4)),
    "Dropout1d": lambda: (fnn.Dropout1d(0.3), (5, 4, 2)),
    "Dropout2d": lambda: (fnn.Dropout2d(0.3), (5, 4, 2, 2)),
    "Dropout3d": lambda: (fnn.Dropout3d(0.3), (2, 4, 2, 2, 2)),
    "DropoutAddLayerNorm": lambda: (fnn.DropoutAddLayerNorm(4, p=0.3, **HERE), (5, 4)),
    "FeatureAlphaDropout": lambda: (fnn.FeatureAlphaDropout(0.3), (5, 4, 2)),
    "GaussianNoise": lambda: (fnn.GaussianNoise(0.3), (5, 4)),
    "GroupNorm": lambda: (fnn.GroupNorm(2, 4, **HERE), (5, 4, 3)),
    "InstanceNorm1d": lambda: (fnn.InstanceNorm1d(4, affine=True, **HERE), (5, 4, 3)),
    "InstanceNorm2d": lambda: (fnn.InstanceNorm2d(4, track_running_stats=True, **HERE), (5, 4, 3, 2)),
    "InstanceNorm3d": lambda: (fnn.InstanceNorm3d(4, **HERE), (3, 4, 3, 2, 2)),
    "LayerNorm": lambda: (fnn.LayerNorm(4, **HERE), (5, 4)),
    "LocalResponseNorm": lambda: (fnn.LocalResponseNorm(3), (5, 4, 3)),
    "NoisyLinear": lambda: (fnn.NoisyLinear(4, 3, mode="factorised", **HERE), (5, 4)),
    "SyncBatchNorm": lambda: (fnn.SyncBatchNorm(4, **HERE).eval(), (5, 4)),
}


@case(*MODULES)
def modules():
    found = []
    for make in MODULES.values():
        module, shape = make()
        for training in (module.training, False):
            module.train(training)
            inputs = [tensor(*shape) for _ in range(2 if isinstance(module, fnn.DropoutAddLayerNorm) else 1)]
            y = module(*inputs)
            y.square().sum().backward()
            found += [y, *(x.grad for x in inputs), *module.state_dict().values()]
            found += [p.grad for p in module.parameters()]
    return found


def network() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 2, **HERE),
        fnn.BatchNorm2d(4, **HERE),
        fnn.Dropout(0.3),
        nn.Flatten(),
        nn.Linear(16, 2, **HERE),
    )


@case("mc_dropout", "update_bn", "fold_batch_norm")
def networks():
    model = network()
    data = [tensor(4, 3, 3, 3, seed=i, grad=False) for i in range(3)]
    found = []
    for estimator in ("minibatch", "pooled"):
        fastreg.update_bn(model, data, estimator=estimator)
        found += model.state_dict().values()
    with fastreg.mc_dropout(model):
        found.append(model(data[0]))
    return [*found, fastreg.fold_batch_norm(model.eval())(data[0])]


# --- optimizers, averages, penalties ----------------------------------------------------------------------

STEPS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1},
    "SGDW": {"lr": 0.1, "weight_decay": 0.1, "cautious": True},
    "Adam": {"lr": 0.003, "weight_decay": 0.1, "amsgrad": True, "max_grad_norm": 1.7},
    "AdamW": {"lr": 0.003, "weight_decay": 0.1},
}
MORE = [
    {},
    {"max_norm": 0.7, "max_norm_dim": 0},
    {"ema_decay": 0.9, "l1": 0.001},
    {"master_weights": True, "ema_decay": 0.9},
    {"stochastic_rounding": True},
]


def trained(name: str, options: dict, dtype: torch.dtype) -> list[Tensor]:
    parameters = [nn.Parameter(tensor(*shape, seed=1, dtype=dtype)) for shape in ((3, 4), (5,))]
    optimizer = getattr(optim, name)(parameters, **options)
    for i in range(2):
        for p in parameters:
            p.grad = tensor(*p.shape, seed=i, dtype=dtype, grad=False)
        optimizer.step()
    state = [x.double() for p in parameters for x in optimizer.state[p].values()]
    return [*parameters, *state, optimizer.grad_norm if "max_grad_norm" in options else parameters[0]]


@case(*STEPS)
def optimizers():
    found = []
    dtypes = itertools.cycle([torch.float32, torch.bfloat16, torch.float64])
    for name, options in STEPS.items():
        for more in MORE:
            found += trained(name, {**options, **more}, next(dtypes))
    return found


@case("ExponentialMovingAverage", "BestWeights", "get_ema_multi_avg_fn")
def averaged():
    model = network()
    average, best = fastreg.ExponentialMovingAverage(model, 0.9), fastreg.BestWeights(model)
    lists = [x.clone() for x in model.parameters()], [x.detach() + 1 for x in model.parameters()]
    with torch.no_grad():
        for p in model.parameters():
            p.add_(1)
        average.update()
        best.update(torch.ones((), dtype=torch.bool, device=CPU))
        averages.get_ema_multi_avg_fn(0.999)(*lists, None)
    return [*average.tensors.values(), *best.tensors.values(), *lists[0]]


@case("l1", "l2", "elastic_net", "GaussianPrior", "LaplacePrior", "max_norm_")
def penalized():
    found = []
    for terms in (
        lambda p: penalties.l1(p, 0.001),
        lambda p: penalties.l2(p, 0.001),
        lambda p: penalties.elastic_net(p, 0.001, 0.003),
        lambda p: penalties.l2(p, 0.001, accumulate=True) + 0 * p[0].sum(),
        penalties.GaussianPrior(0.3, constant=True, examples=10),
        penalties.LaplacePrior(0.3, mean=0.1, constant=True),
    ):
        parameters = [nn.Parameter(tensor(*shape)) for shape in ((3, 4), (5,))]
        value = terms(parameters)
        value.backward()
        found += [value, *(p.grad for p in parameters)]
    weight = tensor(3, 4, grad=False)
    for dim in (0, None):
        penalties.max_norm_([weight], 0.7, dim)
        found.append(weight.clone())
    return [*found, penalties.l2([], 0.1)]


@case(
    "normal",
    "row_normals",
    "signs",
    "draws",
    "keep_mask",
    "connection_lanes",
    "connection_mask",
    "stream",
    "words",
)
def drawn():
    chance = random.chance(0.3)
    return [
        random.normal((5, 3), STREAM, device=CPU),
        random.row_normals(5, 3, STREAM, device=CPU),
        random.signs(5, 3, STREAM, device=CPU),
        random.draws((5, 3), 1, STREAM, device=CPU),
        random.keep_mask((5, 3), 0.3, STREAM, device=CPU),
        random.connection_lanes(0, 5, 3, chance, STREAM, device=CPU),
        random.connection_mask(torch.arange(5, dtype=torch.int64, device=CPU), 5, 3, chance, STREAM),
        torch.full((), random.stream(CPU).seed, dtype=torch.int64, device=CPU),
        random.stream(CPU, 7).seed_on(CPU),
        random.words(torch.arange(5, dtype=torch.int64, device=CPU), STREAM),
    ]


# --- the sweep --------------------------------------------------------------------------------------------


@functools.cache
def expected(name: str, path: str) -> list[Tensor]:
    """What the case gives under torch's own defaults, by kernels or ATen: asked first in a test."""
    return run(name)


def run(name: str) -> list[Tensor]:
    torch.manual_seed(3)
    return [x.detach() for x in CASES[name][0]() if x is not None]


@pytest.fixture(params=["bf16", "fp16", "fp64", "meta"])
def other_default(request):
    """A context in which one default is another one; which it is shall not be seen by what is made in the fixture."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

    def change():
        if request.param in dtypes:
            torch.set_default_dtype(dtypes[request.param])
        else:
            torch.set_default_device(request.param)

    yield change
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


@pytest.mark.parametrize("name", CASES)
def test_results_do_not_depend_on_defaults(name, other_default, path):
    before = expected(name, path)
    other_default()
    found = run(name)
    assert len(found) == len(before)
    for i, (x, y) in enumerate(zip(found, before, strict=True)):
        assert (x.dtype, x.device, x.shape) == (y.dtype, y.device, y.shape), i
        same = (
            torch.equal(x.view(torch.uint8), y.view(torch.uint8))
            if x.dim()
            else x.equal(y) or (x != x and y != y)
        )
        assert same, f"result {i}: {x} and {y}"


def test_every_public_name_has_a_case():
    covered = {name for _, names in CASES.values() for name in names}
    for public in (F, fnn, optim, penalties, averages):
        assert {name for name in public.__all__ if callable(getattr(public, name))} <= covered
    assert {*STEPS} == set(optim.__all__)
    tried = {key for options in (*STEPS.values(), *MORE) for key in options}
    assert set(OPTIONS) - tried == {"l1_mode", "decouple_lr"}  # numbers on the host
    assert set(MODULES) == set(fnn.__all__)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_adam_counts_steps_whatever_the_default_dtype(dtype, path, device):
    """In bf16 a counter stays at 256, in fp16 at 2048: the next number is rounded to it."""
    ours, theirs = (nn.Parameter(torch.ones(1, dtype=torch.float32, device=device)) for _ in range(2))
    pairs = [
        (ours, optim.Adam([ours], lr=1e-3)),
        (theirs, torch.optim.Adam([theirs], lr=1e-3, foreach=False)),
    ]
    torch.set_default_dtype(dtype)
    try:
        for p, optimizer in pairs:
            for _ in range(4):
                p.grad = torch.ones(1, dtype=torch.float32, device=device)
                optimizer.step()
                optimizer.state[p]["step"].clamp_(min=2047)
    finally:
        torch.set_default_dtype(torch.float32)
    steps = [optimizer.state[p]["step"] for p, optimizer in pairs]
    assert steps[0] == steps[1] == 2050
    if path == "aten":
        assert steps[0].dtype == steps[1].dtype
    torch.testing.assert_close(
        ours, theirs, rtol=1e-6, atol=0
    )  # four roundings of 6e-8, and those of the moments


def test_a_counter_that_is_a_number_is_read(path):
    """As checkpoints of old have it: its dtype is not the default one either."""
    p = nn.Parameter(tensor(3))
    optimizer = optim.AdamW([p], stochastic_rounding=True)
    p.grad = tensor(3, grad=False)
    optimizer.step()
    state = optimizer.state_dict()
    state["state"][0]["step"] = 300
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer.load_state_dict(state)
        optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"] == 301


FACTORIES = (
    *(
        "arange",
        "empty",
        "empty_strided",
        "eye",
        "full",
        "linspace",
        "logspace",
        "ones",
        "rand",
        "randint",
        "randn",
    ),
    *("randperm", "scalar_tensor", "tensor", "zeros"),
)


def test_every_tensor_that_is_made_has_its_dtype_said():
    """In the text: what no case above reaches."""
    silent = []
    for path in Path(fastreg.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in [
                f"torch.{name}" for name in FACTORIES
            ]:
                said = {keyword.arg for keyword in node.keywords}  # None is of a dict of arguments
                if not said & {"dtype", None}:
                    silent.append(f"{path.name}:{node.lineno}")
    assert not silent
