"""What torch's tools make of our layers: torch.fx, torch.jit, pickle, and code that assigns to ``__class__``."""

import copy
import importlib
import io
import pickle

import pytest
import torch
from every_layer import LAYERS
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing import assert_close

import fastreg.functional as F
import fastreg.nn as fnn
from fastreg.ops import backend

all_layers = pytest.mark.parametrize("name", LAYERS)
layers_of_torch = pytest.mark.parametrize("name", [name for name, case in LAYERS.items() if case.torchs])


def _draws(name, training):
    """Whether the layer is random. (The expectation of silu over masks is an average of draws.)"""
    return name.endswith("silu") or (training and ("Drop" in name or "Nois" in name))


# --- torch.fx -------------------------------------------------------------------------------------------------


class _Model(nn.Module):
    """A layer on an input and on a buffer, which no proxy stands for while torch.fx traces."""

    def __init__(self, case):
        super().__init__()
        self.layer = case.make()
        self.register_buffer("position", torch.randn(case.shape))

    def forward(self, x):
        return self.layer(x), self.layer(self.position)


@all_layers
def test_layers_are_leaves_of_fx(name, device):
    """Traced in training mode, they obey ``eval()`` afterwards, and the other way round."""
    case = LAYERS[name]
    model = _Model(case).to(device)
    x = torch.randn(case.shape, device=device)
    for training in (True, False):
        traced = torch.fx.symbolic_trace(model.train(training))
        calls = [node.target for node in traced.graph.nodes if node.op not in ("placeholder", "output")]
        assert calls == ["layer", "position", "layer"] or calls == ["position", "layer", "layer"]
        assert traced.layer is model.layer
        for mode in (False, True):
            torch.manual_seed(1)
            y = traced.train(mode)(x)
            torch.manual_seed(1)
            assert_close(y, model.train(mode)(x))


class _Fused(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = fnn.BatchNorm1d(6, activation="relu")
        self.drop = fnn.Dropout(0.5, activation="gelu")
        self.seam = fnn.DropoutAddLayerNorm(6, prenorm=True)

    def forward(self, x, bias):
        x = self.norm(x, residual=x)
        y = self.drop(x, bias=bias, residual=x)
        return self.seam(y, x)[0]


def test_fused_arguments_survive_fx(device):
    model = _Fused().to(device)
    traced = torch.fx.symbolic_trace(model)
    keywords = [set(node.kwargs) for node in traced.graph.nodes if node.op == "call_module"]
    assert keywords == [{"residual"}, {"bias", "residual"}, set()]
    x, bias = torch.randn(4, 6, device=device), torch.randn(6, device=device)
    for training in (False, True):
        traced.train(training)
        torch.manual_seed(1)
        y = traced(x, bias)
        torch.manual_seed(1)
        assert_close(y, model(x, bias))
    again = pickle.loads(pickle.dumps(traced)).eval()
    assert type(again.drop) is fnn.Dropout
    assert_close(again(x, bias), model.eval()(x, bias))


def test_a_mode_that_is_an_argument_stays_one(aten):
    """Functions are recorded as calls of torch's."""

    def net(x, training: bool):
        return F.batch_norm(F.dropout(x, 0.5, training), x.mean(0), x.var(0), training=training)

    traced = torch.fx.symbolic_trace(net)
    assert len([node for node in traced.graph.nodes if node.op == "call_function"]) == 2
    x = torch.randn(4, 6)
    assert_close(traced(x, False), net(x, False))
    torch.manual_seed(0)
    y = traced(x, True)
    torch.manual_seed(0)
    assert_close(y, net(x, True))


def test_hooks_of_a_leaf_run_with_tensors_only():
    layer = fnn.LayerNorm(6)
    layer.register_forward_hook(lambda module, inputs, y: 2 * y)
    traced = torch.fx.symbolic_trace(nn.Sequential(layer))
    x = torch.randn(4, 6)
    assert_close(traced(x), layer(x))


def test_a_tracer_may_still_look_into_our_layers():
    """As into torch's: by a tracer of its own, or where the layer is what is traced."""

    class Deep(torch.fx.Tracer):
        def is_leaf_module(self, module, name):
            return False

    for layers, nothing in ((fnn, {"bias": None, "residual": None}), (nn, {})):
        graph = Deep().trace(nn.Sequential(layers.LayerNorm(6)))
        assert "call_module" not in {node.op for node in graph.nodes}
        graph = torch.fx.symbolic_trace(layers.Dropout(), nothing).graph
        assert "call_module" not in {node.op for node in graph.nodes}


def test_subclasses_and_layers_whose_class_was_changed_are_leaves_too():
    class Twice(fnn.BatchNorm1d):
        def forward(self, input):
            return 2 * super().forward(input)

    changed = nn.Dropout()
    changed.__class__ = fnn.Dropout
    traced = torch.fx.symbolic_trace(nn.Sequential(Twice(6), changed))
    assert [node.op for node in traced.graph.nodes].count("call_module") == 2


def test_a_tracer_is_asked_by_the_names_of_torchs_arguments():
    changed = nn.Dropout()
    changed.__class__ = fnn.Dropout
    assert torch.fx.Tracer().is_leaf_module(m=changed, module_qualified_name="drop")
    assert not torch.fx.Tracer().is_leaf_module(m=nn.Sequential(), module_qualified_name="net")


@pytest.mark.filterwarnings("ignore")
def test_layers_stay_what_they_are_in_quantization(device):
    """Its tracer does not ask torch's Tracer which modules are leaves."""
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx")
    quantization = importlib.import_module("torch.ao.quantization")
    mapping = quantization.get_default_qat_qconfig_mapping("x86")
    model = nn.Sequential(nn.Linear(6, 6), fnn.BatchNorm1d(6), nn.ReLU(), fnn.Dropout(0.5), fnn.LayerNorm(6))
    x = torch.randn(40, 6)
    prepared = quantize.prepare_qat_fx(model.train(), mapping, (x,))
    assert [type(prepared.get_submodule(name)) for name in "134"] == [
        fnn.BatchNorm1d,
        fnn.Dropout,
        fnn.LayerNorm,
    ]
    assert prepared(x).requires_grad
    prepared.eval().apply(quantization.disable_observer)
    assert_close(prepared(x), prepared(x))


@all_layers
@pytest.mark.filterwarnings("ignore")
def test_quantization_leaves_our_layers_as_they_are(name, device):
    """torch quantizes the layers of its own that it knows by their classes."""
    quantize = pytest.importorskip("torch.ao.quantization.quantize_fx")
    mapping = importlib.import_module("torch.ao.quantization").get_default_qconfig_mapping("x86")
    case = LAYERS[name]
    layer, x = case.make().eval(), torch.randn(case.shape)
    prepared = quantize.prepare_fx(nn.Sequential(layer), mapping, (x,))
    prepared(x)
    quantized = quantize.convert_fx(prepared)
    assert type(quantized.get_submodule("0")) is type(layer)
    if not _draws(name, False):
        assert_close(quantized(x), layer(x), rtol=0, atol=0)


# --- torch.export and torch.onnx --------------------------------------------------------------------------------


@all_layers
@pytest.mark.parametrize("training", [False, True])
def test_exported_layers_compute_the_same(name, training, device, path):
    case = LAYERS[name]
    layer = case.make().to(device).train(training)
    x = torch.randn(case.shape, device=device)
    exported = torch.export.export(layer, (x,)).module()
    torch.manual_seed(0)
    y = exported(x)
    if _draws(name, training):
        assert not y.equal(exported(x))
    else:
        assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


@all_layers
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.filterwarnings("ignore")
def test_models_are_exported_to_onnx(name, dynamo, tmp_path, monkeypatch):
    """The old exporter (dynamo=False) hands keyword-only arguments over by their places, so it takes no layer alone."""
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    monkeypatch.setattr(backend, "INTERPRETED", False)  # there is no ONNX of our kernels
    case = LAYERS[name]
    model, x = nn.Sequential(case.make()).eval(), torch.randn(case.shape)
    path = str(tmp_path / "model.onnx")
    torch.onnx.export(model, (x,), path, dynamo=dynamo)
    session = runtime.InferenceSession(path)
    (y,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    if not _draws(name, False):
        assert_close(torch.from_numpy(y), model(x), rtol=1e-4, atol=1e-4)


# --- make_fx ----------------------------------------------------------------------------------------------------


@all_layers
@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@pytest.mark.parametrize("training", [False, True])
def test_make_fx_records_all_that_is_computed(name, mode, training, device, path):
    """A kernel would leave a graph that returns memory nobody has written."""
    case = LAYERS[name]
    layer = case.make().to(device).train(training)
    x = torch.randn(case.shape, device=device)
    options = {"pre_dispatch": False, "tracing_mode": mode, "_allow_non_fake_inputs": True}
    with torch.no_grad():
        graph = make_fx(layer, **options)(x)
        torch.manual_seed(0)
        y, again = graph(x), graph(x)
        if _draws(name, training):
            assert not y.equal(again)
        else:
            assert_close(again, y, rtol=0, atol=0)
            assert_close(y, layer(x), rtol=1e-5, atol=1e-5)


# --- torch.jit ------------------------------------------------------------------------------------------------


@all_layers
@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_script_refuses_in_one_sentence(name, inside):
    layer = LAYERS[name].make()
    model = nn.Sequential(nn.ReLU(), layer) if inside else layer
    with pytest.raises(
        RuntimeError, match=r"^torch\.jit\.script cannot compile fastreg\.nn\.\w+: .*torch\.compile"
    ):
        torch.jit.script(model)
    assert not inside or model[1] is layer


@all_layers
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.filterwarnings(
    "ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::torch.jit.TracerWarning"
)
def test_traces_compute_the_same_and_draw_anew(name, training, device, path):
    case = LAYERS[name]
    layer = case.make().to(device).train(training)
    twin = copy.deepcopy(layer)
    x = torch.randn(case.shape, device=device)
    traced = torch.jit.trace(layer, x, check_trace=False)
    saved = io.BytesIO()
    torch.jit.save(traced, saved)
    saved.seek(0)
    traced = torch.jit.load(saved)
    twin.load_state_dict(layer.state_dict())
    draws = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        draws.append(traced(x))
    assert draws[0].equal(draws[1]) != _draws(name, training)
    if not _draws(name, training):
        assert_close(draws[0], twin(x), rtol=1e-5, atol=1e-5)


# --- classes that are assigned, pickled and copied ------------------------------------------------------------


@layers_of_torch
def test_a_layer_of_torch_becomes_ours_by_its_class(name, device):
    """Tools assign to ``__class__``, and unpickle into other classes: what ``__init__`` would set has a default."""
    case = LAYERS[name]
    theirs = case.torchs(device=device) if list(case.torchs().parameters()) else case.torchs()
    x = torch.randn(case.shape, device=device)
    expected = theirs.eval()(x)
    ours = getattr(fnn, case.layer)
    for training in (False, True):
        for layer in (
            _assigned(theirs, ours),
            _unpickled(theirs, type(theirs), ours),
            copy.deepcopy(_assigned(theirs, ours)),
            pickle.loads(pickle.dumps(_assigned(theirs, ours))),
        ):
            assert type(layer) is ours
            assert_close(layer.eval()(x), expected, rtol=1e-5, atol=1e-5)
            assert layer.train(training)(x).shape == expected.shape
            assert repr(layer) == repr(ours(*case.arguments))
            assert layer.state_dict().keys() == theirs.state_dict().keys()
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()


def _assigned(layer, cls):
    layer = copy.deepcopy(layer)
    layer.__class__ = cls
    return layer


def _unpickled(layer, cls, other):
    class Unpickler(pickle.Unpickler):
        def find_class(self, module, name):
            found = super().find_class(module, name)
            return other if found is cls else found

    return Unpickler(io.BytesIO(pickle.dumps(layer))).load()


@all_layers
def test_layers_can_be_copied_and_pickled(name):
    layer = LAYERS[name].make()
    x = torch.randn(LAYERS[name].shape)
    for twin in (copy.deepcopy(layer), copy.copy(layer), pickle.loads(pickle.dumps(layer))):
        assert type(twin) is type(layer)
        assert repr(twin) == repr(layer)
        assert type(twin).__module__.startswith("fastreg.nn.")
        torch.manual_seed(2)
        y = twin.eval()(x)
        torch.manual_seed(2)
        assert_close(y, layer.eval()(x))
