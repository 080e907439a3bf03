"""``fastreg.convert`` on models of torch alone: what changes, what stays, and what is refused.

The models of other libraries: ``test_convert_libraries.py``. Tools that people use: ``test_convert_tools.py``.
"""

import copy
import io
import json
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.testing import assert_close

import fastreg
import fastreg.functional as F
import fastreg.nn as fnn
from fastreg.blocks import known
from fastreg.blocks.activations import Absorbed

ACTIVATIONS = {
    "relu": lambda: nn.ReLU(inplace=True),
    "leaky_relu": nn.LeakyReLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU("tanh"),
    "silu": nn.SiLU,
    "sigmoid": nn.Sigmoid,
    "tanh": nn.Tanh,
    "elu": nn.ELU,
    "mish": nn.Mish,
    "hardswish": nn.Hardswish,
    "relu6": nn.ReLU6,
    "hardsigmoid": nn.Hardsigmoid,
}

LAYERS = {
    "BatchNorm1d": (nn.BatchNorm1d, (6,), (4, 6)),
    "BatchNorm2d": (nn.BatchNorm2d, (6,), (4, 6, 5, 3)),
    "BatchNorm3d": (nn.BatchNorm3d, (6,), (4, 6, 2, 3, 2)),
    "SyncBatchNorm": (nn.SyncBatchNorm, (6,), (4, 6, 5)),
    "GroupNorm": (nn.GroupNorm, (2, 6), (4, 6, 5)),
    "InstanceNorm1d": (nn.InstanceNorm1d, (6,), (4, 6, 5)),
    "InstanceNorm2d": (nn.InstanceNorm2d, (6,), (4, 6, 5, 3)),
    "InstanceNorm3d": (nn.InstanceNorm3d, (6,), (4, 6, 2, 3, 2)),
    "LayerNorm": (nn.LayerNorm, (6,), (4, 6)),
    "LocalResponseNorm": (nn.LocalResponseNorm, (3,), (4, 6, 5)),
    "Dropout": (nn.Dropout, (0.3,), (4, 6)),
    "Dropout1d": (nn.Dropout1d, (0.3,), (4, 6, 5)),
    "Dropout2d": (nn.Dropout2d, (0.3,), (4, 6, 5, 3)),
    "Dropout3d": (nn.Dropout3d, (0.3,), (4, 6, 2, 3, 2)),
    "AlphaDropout": (nn.AlphaDropout, (0.3,), (4, 6)),
    "FeatureAlphaDropout": (nn.FeatureAlphaDropout, (0.3,), (4, 6, 5)),
}


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.SiLU(inplace=True),
        nn.GroupNorm(2, 8),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(128, 16),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.LayerNorm(16),
        nn.Linear(16, 2),
    )


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(n))


def everything(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """Outputs in training and in evaluation, gradients and buffers."""
    torch.manual_seed(3)
    model.zero_grad()
    y = model.train()(x)
    y.square().mean().backward()
    gradients = [p.grad for p in model.parameters()]
    return [y, *gradients, *(b.clone() for b in model.buffers()), model.eval()(x)]


def insides(model: nn.Module) -> list:
    """Types and attributes of all modules; tensors by their identity."""
    return [
        (type(module), {name: value for name, value in vars(module).items() if name != "training"})
        for module in model.modules()
    ]


def kinds(model: nn.Module) -> list[type]:
    return [type(module) for module in model.modules()]


# --- what changes, and what stays -------------------------------------------------------------------------


def test_every_layer_of_torch_that_we_have_is_known(aten):
    ours = {name for name in fnn.__all__ if hasattr(nn, name)}
    assert (
        {kind.__name__ for kind in known()[0] if kind.__module__.startswith("torch.nn")}
        == ours
        == set(LAYERS)
    )


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_becomes_ours_with_the_same_results_to_the_bit(name, aten):
    make, arguments, shape = LAYERS[name]
    x = torch.randn(shape)
    theirs = make(*arguments)
    ours = fastreg.convert(copy.deepcopy(theirs))
    assert type(ours) is getattr(fnn, name)
    if name != "SyncBatchNorm":  # whose torch form needs a GPU in training
        for training in (True, False):
            torch.manual_seed(1)
            wanted = theirs.train(training)(x)
            torch.manual_seed(1)
            assert torch.equal(ours.train(training)(x), wanted)
    assert repr(ours) == repr(theirs)


def test_a_model_is_the_same_object_with_the_same_tensors_names_and_modes():
    model = network()
    model[3].eval()
    model[9].weight.requires_grad_(False)
    modules, tensors = dict(model.named_modules()), model.state_dict(keep_vars=True)
    modes = [module.training for module in model.modules()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert fastreg.convert(model) is model
    assert dict(model.named_modules()) == modules
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(tensors)
    assert all(after[name] is tensor for name, tensor in tensors.items())
    assert [module.training for module in model.modules()] == modes
    assert all(p is q for p, q in zip(model.parameters(), optimizer.param_groups[0]["params"], strict=True))


@pytest.mark.parametrize("fuse", [False, True])
def test_results_are_the_same_on_the_cpu(fuse, aten):
    model = network()
    wanted = everything(copy.deepcopy(model), images())
    for found, value in zip(everything(fastreg.convert(model, fuse=fuse), images()), wanted, strict=True):
        assert_close(found, value, atol=0 if not fuse else 1e-6, rtol=0 if not fuse else 1e-6)


def test_results_are_the_same_on_the_kernels(device):
    """Masks are other draws there, so without dropout. fp32: sums of some hundred terms, in another order."""
    model = network().to(device)
    model[8].p = 0.0
    x = images().to(device)
    wanted = everything(copy.deepcopy(model), x)
    for found, value in zip(everything(fastreg.convert(model), x), wanted, strict=True):
        assert_close(found, value, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_layouts_are_those_of_the_model(dtype, layout, aten):
    model = network().to(dtype).to(memory_format=layout)
    x = images().to(dtype).contiguous(memory_format=layout)
    wanted = everything(copy.deepcopy(model), x)
    for found, value in zip(everything(fastreg.convert(model), x), wanted, strict=True):
        assert found.dtype == value.dtype
        assert found.stride() == value.stride()
        assert_close(found, value)


def test_a_second_call_changes_nothing():
    model = fastreg.convert(network())
    before = insides(model)
    fastreg.convert(model)
    after = insides(model)
    assert [(kind, list(state)) for kind, state in after] == [(kind, list(state)) for kind, state in before]
    for (_, state), (_, former) in zip(after, before, strict=True):
        assert all(state[name] is former[name] for name in former)


def test_fusion_can_follow_later(aten):
    model = network()
    once, twice = fastreg.convert(copy.deepcopy(model)), fastreg.convert(fastreg.convert(model, fuse=False))
    assert kinds(twice) == kinds(once)
    assert torch.equal(twice.eval()(images()), once.eval()(images()))


@pytest.mark.parametrize("fuse", [False, True])
def test_revert_takes_all_of_it_back(fuse):
    model = network()
    before = insides(model)
    fastreg.convert(model, fuse=fuse)
    assert fastreg.revert(model) is model
    after = insides(model)
    assert [(kind, list(state)) for kind, state in after] == [(kind, list(state)) for kind, state in before]
    for (_, state), (_, former) in zip(after, before, strict=True):
        assert all(state[name] is former[name] for name in former)


def test_revert_leaves_what_was_ours_before():
    model = nn.Sequential(
        fnn.BatchNorm2d(3, activation="relu"), fnn.BatchNorm2d(3), nn.ReLU(), nn.LayerNorm(3)
    )
    fastreg.convert(model)
    assert (model[1].activation, type(model[2])) == ("relu", Absorbed)
    fastreg.revert(model)
    assert kinds(model)[1:] == [fnn.BatchNorm2d, fnn.BatchNorm2d, nn.ReLU, nn.LayerNorm]
    assert (model[0].activation, model[1].activation) == ("relu", None)


def test_what_is_trained_between_stays_trained(aten):
    model = fastreg.convert(network())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(images()).square().mean().backward()
    optimizer.step()
    wanted = model.eval()(images())
    assert_close(fastreg.revert(model)(images()), wanted, atol=1e-6, rtol=1e-6)


def test_a_filter_chooses():
    model = nn.Sequential(nn.BatchNorm2d(3), nn.ReLU(), nn.Sequential(nn.BatchNorm2d(3), nn.ReLU()))
    seen = []

    def choose(module, name):
        seen.append((name, type(module)))
        return name != "0"

    fastreg.convert(model, filter=choose)
    assert kinds(model)[1:] == [nn.BatchNorm2d, nn.ReLU, nn.Sequential, fnn.BatchNorm2d, Absorbed]
    assert seen == [("0", nn.BatchNorm2d), ("2.0", nn.BatchNorm2d)]


def test_a_shared_module_is_converted_once_and_not_fused(aten):
    norm = nn.BatchNorm1d(6)
    model = nn.Sequential(nn.Linear(6, 6), norm, nn.ReLU(), nn.Linear(6, 6), norm, nn.ReLU())
    x = torch.randn(5, 6)
    wanted = everything(copy.deepcopy(model), x)
    fastreg.convert(model)
    assert model[1] is model[4] is norm
    assert (type(norm), norm.activation) == (fnn.BatchNorm1d, None)
    for found, value in zip(everything(model, x), wanted, strict=True):
        assert torch.equal(found, value)
    fastreg.revert(model)
    assert type(norm) is nn.BatchNorm1d


def test_tied_parameters_stay_tied():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    model[1].weight = model[0].weight
    fastreg.convert(model)
    assert model[1].weight is model[0].weight


@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_pickles_and_copies_are_converted_models(protocol, aten):
    model = fastreg.convert(network()).eval()
    wanted = model(images())
    saved = io.BytesIO()
    torch.save(model, saved, pickle_protocol=protocol)
    saved.seek(0)
    for other in (
        torch.load(saved, weights_only=False),
        pickle.loads(pickle.dumps(model, protocol)),
        copy.deepcopy(model),
    ):
        assert kinds(other) == kinds(model)
        assert torch.equal(other(images()), wanted)
        for parent, _ in other[2].absorbed_by:
            assert parent is other
        assert kinds(fastreg.revert(other)) == kinds(network())


def test_state_dicts_go_both_ways():
    model, converted = network(), fastreg.convert(network())
    converted.load_state_dict(model.state_dict())
    model.load_state_dict(converted.state_dict())
    assert list(model.state_dict()) == list(converted.state_dict())


# --- what is left, and what is refused --------------------------------------------------------------------


class OwnNorm(nn.LayerNorm):
    def forward(self, input):
        return 2 * super().forward(input)


def reasons(model: nn.Module, **arguments) -> dict[str, str]:
    found = fastreg.explain(model, **arguments).layers
    return {layer["name"]: layer["why_not"] for layer in found if layer["becomes"] is None}


def test_a_subclass_stays_with_a_reason():
    model = nn.Sequential(OwnNorm(4), nn.LayerNorm(4))
    assert reasons(model) == {"0": "a subclass of torch.nn.LayerNorm that fastreg does not know"}
    fastreg.convert(model)
    assert kinds(model)[1:] == [OwnNorm, fnn.LayerNorm]


def test_a_replaced_forward_stays():
    """As accelerate's hooks replace it: the class no longer decides what is computed."""
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    model[0].forward = lambda x: x
    fastreg.convert(model)
    assert kinds(model)[1:] == [nn.LayerNorm, fnn.LayerNorm]
    assert reasons(model) == {"0": "its forward was replaced"}


def test_a_lazy_layer_stays_until_it_is_one():
    model = nn.Sequential(nn.LazyBatchNorm1d(), nn.ReLU())
    assert list(reasons(model)) == ["0"]
    assert kinds(fastreg.convert(model))[1:] == [nn.LazyBatchNorm1d, nn.ReLU]
    model(torch.randn(4, 3))
    assert kinds(fastreg.convert(model))[1:] == [fnn.BatchNorm1d, Absorbed]


def test_parametrized_parts_stay():
    model = nn.Sequential(nn.LayerNorm(4), nn.LayerNorm(4))
    parametrizations.weight_norm(model[0], dim=None)
    kind = type(model[0])
    fastreg.convert(model)
    assert kinds(model)[1] is kind
    assert type(model[1]) is fnn.LayerNorm
    assert reasons(model) == {"0": "parametrized"}


def compiled_apart(module):
    return torch.compile(module, backend="eager")


def compiled_in_place(module):
    module.compile(backend="eager")
    return module


@pytest.mark.parametrize("wrap", [compiled_apart, compiled_in_place, torch.jit.script])
def test_what_is_compiled_or_scripted_is_refused_and_nothing_changes(wrap):
    inner = nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())
    model = wrap(inner)
    for function in (fastreg.convert, fastreg.revert, fastreg.explain):
        with pytest.raises(
            RuntimeError, match=r"the model cannot be (converted|reverted), for it is (compiled|scripted)"
        ):
            function(model)
    assert kinds(inner)[1:] == [nn.BatchNorm1d, nn.ReLU]
    outer = nn.Sequential(wrap(nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())), nn.BatchNorm1d(3))
    fastreg.convert(outer)
    assert type(outer[1]) is fnn.BatchNorm1d
    assert not any(isinstance(module, (fnn.BatchNorm1d, Absorbed)) for module in outer[0].modules())
    assert list(reasons(outer)) == ["0"]


def test_what_is_no_module_is_refused():
    for function in (fastreg.convert, fastreg.revert, fastreg.explain):
        with pytest.raises(TypeError, match="expected a module, but got a list"):
            function([nn.LayerNorm(3)])


def test_an_error_on_the_way_leaves_nothing_behind(monkeypatch):
    model = network()
    before = insides(model)

    def fail(module, *arguments, **keywords):
        if isinstance(module, nn.ReLU):
            raise KeyboardInterrupt
        return swap(module, *arguments, **keywords)

    from fastreg.conversion import apply

    swap = apply.swap
    monkeypatch.setattr(apply, "swap", fail)
    with pytest.raises(KeyboardInterrupt):
        fastreg.convert(model)
    after = insides(model)
    assert [(kind, list(state)) for kind, state in after] == [(kind, list(state)) for kind, state in before]


def test_no_library_is_imported():
    import subprocess

    code = (
        "import sys, torch, fastreg\n"
        "fastreg.convert(torch.nn.Sequential(torch.nn.LayerNorm(3)))\n"
        "loaded = {name.partition('.')[0] for name in sys.modules}\n"
        "print(sorted(loaded & {'timm', 'torchvision', 'transformers', 'rich'}))"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[]"


# --- fusion in sequences ----------------------------------------------------------------------------------


def test_all_activations_that_torch_has_as_a_module_are_known():
    assert {*F.ACTIVATIONS} - {*ACTIVATIONS} == {"quick_gelu"}


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_a_norm_takes_the_activation_behind_it(name, aten):
    model = nn.Sequential(nn.BatchNorm1d(6), ACTIVATIONS[name]())
    x = torch.randn(5, 6)
    wanted = everything(copy.deepcopy(model), x)
    fastreg.convert(model)
    assert model[0].activation == name
    assert (type(model[1]), list(model._modules)) == (Absorbed, ["0", "1"])
    for found, value in zip(everything(model, x), wanted, strict=True):
        assert_close(found, value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    "activation",
    [nn.LeakyReLU(0.2), nn.ELU(2.0), nn.Hardtanh(), nn.Softmax(1), nn.Softplus(beta=2.0)],
    ids=lambda module: type(module).__name__,
)
def test_another_function_stays(activation, aten):
    model = nn.Sequential(nn.BatchNorm1d(6), activation)
    (seam,) = fastreg.explain(model).seams
    assert not seam["fused"]
    assert "is no activation of the kernels" in seam["why_not"]
    fastreg.convert(model)
    assert type(model[1]) is type(activation)
    assert model[0].activation is None


def test_a_dropout_takes_the_activation_before_it(aten):
    model = nn.Sequential(
        nn.Linear(6, 6), nn.GELU(), nn.Dropout(0.5), nn.Linear(6, 6), nn.GELU(), nn.Dropout(0.0)
    )
    x = torch.randn(5, 6)
    wanted = everything(copy.deepcopy(model), x)
    fastreg.convert(model)
    assert (model[2].activation, type(model[1])) == ("gelu", Absorbed)
    assert (model[5].activation, type(model[4])) == (
        None,
        nn.GELU,
    )  # with nothing to drop there is one pass already
    for found, value in zip(everything(model, x), wanted, strict=True):
        assert_close(found, value, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_layers_with_hooks_are_not_fused(which, register):
    model = nn.Sequential(nn.BatchNorm1d(6), nn.ReLU())
    getattr(model[which], register)(lambda *_: None)
    (seam,) = fastreg.explain(model).seams
    assert seam["why_not"] == "hooks would see other values"
    fastreg.convert(model)
    assert kinds(model)[1:] == [fnn.BatchNorm1d, nn.ReLU]


def test_a_sequence_with_a_forward_of_its_own_is_not_fused():
    class Two(nn.Sequential):
        def forward(self, x):
            return self[0](x) + self[1](x)

    model = Two(nn.BatchNorm1d(6), nn.ReLU())
    fastreg.convert(model)
    assert kinds(model)[1:] == [fnn.BatchNorm1d, nn.ReLU]


def test_an_activation_that_is_used_twice_is_not_fused():
    relu = nn.ReLU()
    model = nn.Sequential(nn.BatchNorm1d(6), relu, nn.Linear(6, 6), relu)
    (seam,) = fastreg.explain(model).seams
    assert seam["why_not"] == "it has several places in the model"
    fastreg.convert(model)
    assert model[1] is model[3]
    assert type(relu) is nn.ReLU


def test_an_in_place_dropout_keeps_its_activation_apart():
    model = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Dropout(0.5, inplace=True))
    (seam,) = fastreg.explain(model).seams
    assert seam["why_not"] == "the dropout is in place"


# --- layers that are replaced after the conversion --------------------------------------------------------


def test_torchs_own_synchronized_layers_do_not_lose_the_activation(aten):
    """torch.nn.SyncBatchNorm.convert_sync_batchnorm makes layers without one."""
    model = nn.Sequential(nn.BatchNorm1d(6), nn.GELU()).eval()
    x = torch.randn(5, 6)
    wanted = model(x)
    other = nn.SyncBatchNorm.convert_sync_batchnorm(fastreg.convert(model))
    assert type(other[0]) is nn.SyncBatchNorm
    assert_close(other(x), wanted)
    ours = fnn.SyncBatchNorm.convert_sync_batchnorm(
        fastreg.convert(nn.Sequential(nn.BatchNorm1d(6), nn.GELU()).eval())
    )
    assert ours[0].activation == "gelu"
    assert_close(ours(x), wanted)


def test_a_folded_convolution_does_not_lose_the_activation(aten):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()).eval()
    x = torch.randn(2, 3, 5, 5)
    wanted = model(x)
    fastreg.convert(model)
    model[0] = nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    model[1] = nn.Identity()
    assert_close(model(x), wanted)


def test_a_shared_activation_of_which_one_layer_is_gone_says_so(aten):
    model = fastreg.convert(nn.Sequential(nn.BatchNorm1d(6), nn.ReLU()))
    relu = model[1]
    relu.absorbed_by = (*relu.absorbed_by, (nn.Sequential(nn.Identity()), "0"))
    with pytest.raises(RuntimeError, match="some of the layers that applied this relu were replaced"):
        model(torch.randn(4, 6))


# --- explain ----------------------------------------------------------------------------------------------


def test_explain_changes_nothing_and_is_plain_data():
    model = network()
    before = insides(model)
    found = fastreg.explain(model, images())
    after = insides(model)
    assert [(kind, list(state)) for kind, state in after] == [(kind, list(state)) for kind, state in before]
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()
    assert [(x["name"], x["type"], x["becomes"]) for x in found.layers] == [
        ("1", "nn.BatchNorm2d", "fastreg.nn.BatchNorm2d"),
        ("3", "nn.GroupNorm", "fastreg.nn.GroupNorm"),
        ("8", "nn.Dropout", "fastreg.nn.Dropout"),
        ("9", "nn.LayerNorm", "fastreg.nn.LayerNorm"),
    ]
    assert [(x["kind"], x["parts"], x["fused"]) for x in found.seams] == [
        ("norm -> activation", ["1", "2"], True),
        ("norm -> activation", ["3", "4"], True),
        ("activation -> dropout", ["7", "8"], True),
    ]
    # Five accesses of 4 x 8 x 4 x 4 fp32 elements; four of 4 x 16, and two of a mask.
    assert [x["bytes"] for x in found.seams] == [5 * 4 * 512, 5 * 4 * 512, (4 * 4 + 2) * 64]
    assert found.bytes_saved == sum(x["bytes"] for x in found.seams)


def test_explain_of_a_converted_model_says_the_same():
    model = network()
    before = fastreg.explain(model, images()).as_dict()
    assert fastreg.explain(fastreg.convert(model), images()).as_dict() == before


def test_explain_shows_tables(monkeypatch):
    text = str(fastreg.explain(nn.Sequential(OwnNorm(4), nn.ReLU(), nn.LayerNorm(4))))
    for part in (
        "nn.LayerNorm",
        "fastreg.nn.LayerNorm",
        "a subclass of torch.nn.LayerNorm",
        "norm -> activation",
    ):
        assert part in text
    assert "1 of 2 layers are converted, 0 of 1 seams fused" in text
    monkeypatch.setitem(sys.modules, "rich.console", None)
    assert "2: nn.LayerNorm -> fastreg.nn.LayerNorm" in str(
        fastreg.explain(nn.Sequential(OwnNorm(4), nn.ReLU(), nn.LayerNorm(4)))
    )


def test_the_modes_are_those_from_before_an_example():
    model = network()
    model[1].eval()
    modes = [module.training for module in model.modules()]
    mean = model[1].running_mean.clone()
    fastreg.explain(model, images())
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(model[1].running_mean, mean)


# --- fusion in any code -----------------------------------------------------------------------------------


class Own(nn.Module):
    """Code of a user, with pairs that can be proved and pairs that cannot."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(6, 6)
        self.norm, self.act, self.drop = nn.BatchNorm1d(6), nn.GELU(), nn.Dropout(0.3)
        self.norm2, self.act2 = nn.LayerNorm(6), nn.ReLU()
        self.norm3, self.act3 = nn.LayerNorm(6), nn.Tanh()
        self.norm4, self.act4 = nn.LayerNorm(6), nn.SiLU()
        self.act5, self.drop5 = nn.Mish(), nn.Dropout(0.3)

    def forward(self, x):
        x = self.drop(self.act(self.norm(self.linear(x))))
        y = self.norm2(x)
        x = y + self.act2(y)  # two readers
        x = self.act3(self.norm3(self.act3(x)))  # called twice
        x = self.norm4(x)
        if not self.training:  # not in every mode
            x = self.act4(x)
        return self.drop5(self.act5(self.linear(x)))


def test_a_trace_finds_pairs_in_any_code(aten):
    model, x = Own(), torch.randn(5, 6)
    wanted = everything(copy.deepcopy(model), x)
    before = insides(model)
    seams = fastreg.explain(model, fuse="trace").seams
    after = insides(model)
    assert [(kind, list(state)) for kind, state in after] == [(kind, list(state)) for kind, state in before]
    assert [seam["parts"] for seam in seams if seam["fused"]] == [["norm", "act"], ["act5", "drop5"]]
    assert fastreg.explain(model).seams == []
    fastreg.convert(model, fuse="trace")
    absorbed = {name for name, module in model.named_modules() if isinstance(module, Absorbed)}
    assert absorbed == {"act", "act5"}
    for found, value in zip(everything(model, x), wanted, strict=True):
        assert_close(found, value, atol=1e-6, rtol=1e-6)
    assert kinds(fastreg.revert(model)) == kinds(Own())


def test_a_trace_takes_the_parts_of_what_cannot_be_traced(aten):
    class Unclear(nn.Module):
        def __init__(self):
            super().__init__()
            self.part = Own()

        def forward(self, x):
            return self.part(x) if x.sum() > 0 else -self.part(x)

    model, x = Unclear(), torch.randn(5, 6)
    wanted = everything(copy.deepcopy(model), x)
    fastreg.convert(model, fuse="trace")
    assert isinstance(model.part.act, Absorbed)
    for found, value in zip(everything(model, x), wanted, strict=True):
        assert_close(found, value, atol=1e-6, rtol=1e-6)


def test_fuse_is_a_choice_of_three():
    with pytest.raises(ValueError, match=r"""fuse has to be True, False or "trace", but got 'all'"""):
        fastreg.convert(nn.LayerNorm(3), fuse="all")
