"""Whole models of other libraries, converted: how much of each is fused, how equal the results are, what it saves.

``python -m bench models`` builds every model that is installed, without weights, and compares a training step and
an inference of the model with those of its converted copy, on the CPU: with classes changed alone and with fusion, in
fp32, under autocast to bf16 and with channels last. Nothing here is measured on a GPU.

Launches and bytes of a training step are counted: ATen's operations that compute something, and our kernels where they
would run on a GPU, with the tensors that each reads and writes. An operation counts as one launch, which of ATen's
batch normalization and its reductions is too few.
"""

import copy
import importlib
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastreg.conversion import convert, explain, revert
from fastreg.ops import backend, launch

from .provenance import provenance

TOKENS = {"vocab_size": 100}
SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 128}


class Case(NamedTuple):
    library: str
    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[], Any]


def images(size: int = 64, n: int = 2, channels: int = 3) -> Callable[[], Tensor]:
    return lambda: torch.randn(n, channels, size, size)


def tokens(length: int = 16, n: int = 2) -> Callable[[], dict[str, Tensor]]:
    return lambda: {"input_ids": torch.randint(3, 100, (n, length))}


def _torchvision(name: str, size: int = 64, **arguments: Any) -> Case:
    def make() -> nn.Module:
        return importlib.import_module("torchvision.models").get_model(name, weights=None, **arguments)

    return Case("torchvision", name, make, images(size))


def _timm(name: str, size: int = 64, **arguments: Any) -> Case:
    return Case(
        "timm", name, lambda: importlib.import_module("timm").create_model(name, **arguments), images(size)
    )


def _transformers(name: str, inputs: Callable[[], Any], **arguments: Any) -> Case:
    def make() -> nn.Module:
        library = importlib.import_module("transformers")
        config = library.AutoConfig.for_model(name, **arguments)
        for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
            if getattr(config, token, None) is not None:
                setattr(config, token, 1)
        return library.AutoModel.from_config(config)

    return Case("transformers", name, make, inputs)


def _monai(name: str, inputs: Callable[[], Any], **arguments: Any) -> Case:
    def make() -> nn.Module:
        return getattr(importlib.import_module("monai.networks.nets"), name)(**arguments)

    return Case("monai", name, make, inputs)


def _smp(name: str, encoder: str = "resnet18") -> Case:
    def make() -> nn.Module:
        library = importlib.import_module("segmentation_models_pytorch")
        return getattr(library, name)(encoder_name=encoder, encoder_weights=None)

    return Case("segmentation_models_pytorch", f"{name}, {encoder}", make, images(64))


IN_2D = {"spatial_dims": 2, "in_channels": 1, "out_channels": 2}

CASES = [
    _torchvision("resnet18"),
    _torchvision("resnet50"),
    _torchvision("wide_resnet50_2"),
    _torchvision("resnext50_32x4d"),
    _torchvision("densenet121"),
    _torchvision("vgg11_bn"),
    _torchvision("mobilenet_v2"),
    _torchvision("mobilenet_v3_small"),
    _torchvision("efficientnet_b0"),
    _torchvision("efficientnet_v2_s"),
    _torchvision("mnasnet0_5"),
    _torchvision("shufflenet_v2_x0_5"),
    _torchvision("regnet_y_400mf"),
    _torchvision("googlenet", init_weights=False, aux_logits=False),
    _torchvision("convnext_tiny"),
    _torchvision("swin_t"),
    _torchvision("swin_v2_t"),
    _torchvision("vit_b_16", image_size=64, dropout=0.1),
    _timm("resnet18"),
    _timm("resnet50"),
    _timm("resnet50d", drop_path_rate=0.1),
    _timm("efficientnet_b0", drop_path_rate=0.2),
    _timm("mobilenetv3_small_100"),
    _timm("regnety_002"),
    _timm("densenet121"),
    _timm("convnext_atto", drop_path_rate=0.1),
    _timm("convnextv2_atto"),
    _timm("vit_tiny_patch16_224", img_size=64),
    _timm("deit_tiny_patch16_224", img_size=64, proj_drop_rate=0.1, drop_path_rate=0.1),
    _timm("beit_base_patch16_224", img_size=64),
    _timm("swin_tiny_patch4_window7_224", img_size=64),
    _timm("mixer_s16_224", img_size=64),
    _timm("nfnet_f0"),
    _timm("ghostnet_100"),
    _transformers("bert", tokens(), **TOKENS, **SMALL),
    _transformers("roberta", tokens(), **TOKENS, **SMALL),
    _transformers("distilbert", tokens(), vocab_size=100, dim=64, n_layers=2, n_heads=2, hidden_dim=128),
    _transformers("gpt2", tokens(), n_embd=64, n_layer=2, n_head=2, **TOKENS),
    _transformers("vit", lambda: {"pixel_values": images(32)()}, image_size=32, hidden_dropout_prob=0.1, **SMALL),
    _transformers("convnext", lambda: {"pixel_values": images()()}, depths=[1, 1, 2, 1], hidden_sizes=[16, 32, 48, 64]),
    _transformers(
        "whisper",
        lambda: {"input_features": torch.randn(2, 80, 40), "decoder_input_ids": tokens()()["input_ids"]},
        d_model=64, encoder_ffn_dim=128, decoder_ffn_dim=128, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=2, decoder_attention_heads=2, max_source_positions=20, dropout=0.1,
        activation_dropout=0.1, decoder_start_token_id=1, **TOKENS,
    ),
    _monai("UNet", images(64, 2, 1), channels=(8, 16, 32), strides=(2, 2), num_res_units=2, **IN_2D),
    _monai("BasicUNet", images(64, 2, 1), features=(8, 8, 16, 16, 32, 8), **IN_2D),
    _monai("SegResNet", images(64, 2, 1), init_filters=8, dropout_prob=0.2, **IN_2D),
    _monai("DenseNet121", images(64, 2, 1), **IN_2D),
    _smp("Unet"),
    _smp("DeepLabV3Plus"),
    _smp("FPN", "efficientnet-b0"),
]  # fmt: skip


# --- the same results -------------------------------------------------------------------------------------


def _tensor(output: Any) -> Tensor:
    """The one that a loss is made of."""
    if isinstance(output, Tensor):
        return output
    for name in ("last_hidden_state", "logits"):
        if hasattr(output, name):
            return getattr(output, name)
    return next(iter(output.values())) if isinstance(output, dict) else output[0]


def _call(model: nn.Module, inputs: Any) -> Tensor:
    return _tensor(model(**inputs) if isinstance(inputs, dict) else model(inputs))


def _step(model: nn.Module, inputs: Any) -> Tensor:
    model.zero_grad()
    y = _call(model, inputs)
    y.float().square().mean().backward()
    return y.detach()


def results(model: nn.Module, inputs: Any, autocast: bool) -> dict[str, list[Tensor]]:
    """The results of a training step, and of an inference after it."""
    torch.manual_seed(1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = _step(model.train(), inputs)
        with torch.no_grad():
            inferred = _call(model.eval(), inputs)
    return {
        "outputs": [y, inferred],
        "gradients": [p.grad for p in model.parameters() if p.grad is not None],
        "statistics": [b for b in model.buffers() if b.is_floating_point()],
    }


def difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    """Norm of the difference over the norm, of all tensors together; 0.0 only where all bits are equal."""
    if all(map(torch.equal, ours, theirs)) and len(ours) == len(theirs):
        return 0.0
    pairs = [(x.double(), y.double()) for x, y in zip(ours, theirs, strict=True)]
    squared = sum((x - y).square().sum().item() for x, y in pairs)
    return (squared / max(1e-300, sum(y.square().sum().item() for _, y in pairs))) ** 0.5 or 5e-324


MODES = {"fp32": {}, "autocast": {"autocast": True}, "channels_last": {"channels_last": True}}


def compare(case: Case, repeats: int) -> dict[str, Any]:
    torch.manual_seed(0)
    model = case.make()
    inputs = case.inputs()
    found = explain(model)
    row: dict[str, Any] = {"library": case.library, "model": case.name}
    row["layers"] = len(found.layers)
    row["converted"] = sum(layer["becomes"] is not None for layer in found.layers)
    kinds = sorted({seam["kind"] for seam in found.seams})
    row["seams"] = {
        kind: [
            sum(s["fused"] for s in found.seams if s["kind"] == kind),
            sum(s["kind"] == kind for s in found.seams),
        ]
        for kind in kinds
    }
    row["differences"] = {}
    for mode, options in MODES.items():
        if options.get("channels_last"):
            if isinstance(inputs, dict):
                continue
            model, inputs = (x.to(memory_format=torch.channels_last) for x in (model, inputs))
        plain, classes, fused = model, *(copy.deepcopy(model) for _ in range(2))
        convert(classes, fuse=False)
        convert(fused)
        theirs = results(copy.deepcopy(plain), inputs, "autocast" in options)
        for name, one in (("classes", classes), ("fused", fused)):
            ours = results(one, inputs, "autocast" in options)
            row["differences"][f"{mode}, {name}"] = {k: difference(ours[k], theirs[k]) for k in theirs}
        if mode == "fp32":
            row["state_dict"] = _same_states(model, fused)
            row["time"] = _time_ratio(model, fused, inputs, repeats)
    return row


def _same_states(model: nn.Module, converted: nn.Module) -> bool:
    """Whether checkpoints go both ways, and whether a reverted model is what it was."""
    keys = list(model.state_dict()) == list(converted.state_dict())
    other = copy.deepcopy(model)
    other.load_state_dict(converted.state_dict())
    converted.load_state_dict(other.state_dict())
    kinds = [type(module) for module in revert(copy.deepcopy(converted)).modules()]
    return keys and kinds == [type(module) for module in model.modules()]


def _time_ratio(plain: nn.Module, converted: nn.Module, inputs: Any, repeats: int) -> float:
    """Process time of a training step on the CPU, converted over plain: the least of several, in turns."""
    least = [float("inf")] * 2
    models = [copy.deepcopy(plain).train(), copy.deepcopy(converted).train()]
    for model in models:
        _step(model, inputs)
    for _ in range(repeats):
        for i, model in enumerate(models):
            begin = time.process_time()
            _step(model, inputs)
            least[i] = min(least[i], time.process_time() - begin)
    return least[1] / least[0]


# --- launches and bytes -----------------------------------------------------------------------------------

# Allocations, and the draw of a seed, which on a GPU is the host's.
NO_WORK = (
    "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_", "detach",
    "randint",
)  # fmt: skip


class Counter(TorchDispatchMode):
    """Counts ATen's operations that compute something, and the bytes of the tensors that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.launches = self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        name = function.overloadpacket.__name__
        if (
            name not in NO_WORK
            and not _is_view(function)
            and not name.startswith(("_local_scalar", "detach"))
        ):
            self.add([args, kwargs or {}, result])
        return result

    def add(self, values: Any) -> None:
        tensors = {
            (x.data_ptr(), x.shape): x
            for x in torch.utils._pytree.tree_leaves(values)
            if isinstance(x, Tensor)
        }
        self.launches += 1
        self.bytes += sum(x.numel() * x.element_size() for x in tensors.values())


def _is_view(function: Any) -> bool:
    returned = function._schema.returns
    return bool(returned) and all(r.alias_info is not None and not r.alias_info.is_write for r in returned)


def _native_dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    """As on a GPU: one operation, where the CPU has three."""
    return torch.native_dropout(input, p, training)[0] if training and p else input


@contextmanager
def _kernels_counted(counter: Counter) -> Iterator[None]:
    """Our launches are planned as for a GPU, counted, and not run: what is computed behind them means nothing."""

    def run(self: backend.Launch, device: torch.device) -> None:
        counter.add([value for value in self.arguments.values() if isinstance(value, Tensor)])

    with (
        mock.patch.object(backend, "INTERPRETED", True),
        mock.patch.object(backend, "worth_a_launch", return_value=True),
        mock.patch.object(backend.Launch, "run", run),
    ):
        launch.forget()
        yield
    launch.forget()


def count(model: nn.Module, inputs: Any, kernels: bool) -> dict[str, int]:
    """Launches and bytes of a training step."""
    counter = Counter()
    with (
        mock.patch("torch.nn.functional.dropout", _native_dropout),
        mock.patch("torch.dropout", _native_dropout),
    ):
        if kernels:
            with _kernels_counted(counter), counter:
                _step(model.train(), inputs)
        else:
            with counter:
                _step(model.train(), inputs)
    return {"launches": counter.launches, "bytes": counter.bytes}


COUNTED = [
    _timm("resnet50", 224),
    _timm("efficientnet_b0", 224, drop_path_rate=0.2),
    _timm("vit_small_patch16_224", 224),
    _transformers("bert", tokens(128), **TOKENS),
]


def counts(case: Case) -> dict[str, Any]:
    torch.manual_seed(0)
    model = case.make()
    inputs = case.inputs()
    row: dict[str, Any] = {
        "library": case.library,
        "model": case.name,
        "before": count(model, inputs, kernels=False),
    }
    row["classes"] = count(convert(model, fuse=False), inputs, kernels=True)
    row["fused"] = count(convert(model), inputs, kernels=True)
    return row


# --- all of it --------------------------------------------------------------------------------------------


def run(out: Path, only: list[str], repeats: int, say: Callable[[str], Any] = print) -> dict[str, Any]:
    """Writes the result file and returns its content. only: parts of the names of models; none: all."""

    torch.set_num_threads(1)  # process time counts threads that wait

    def chosen(cases: list[Case]) -> list[Case]:
        return [c for c in cases if not only or any(part in f"{c.library}/{c.name}" for part in only)]

    content: dict[str, Any] = {
        "provenance": {**provenance(torch.device("cpu")), "command": "python -m bench models"},
        "versions": {},
        "rows": [],
        "counts": [],
    }
    for key, cases, function in (
        ("rows", chosen(CASES), lambda case: compare(case, repeats)),
        ("counts", chosen(COUNTED), counts),
    ):
        for case in cases:
            try:
                library = importlib.import_module(case.library)
            except ImportError:
                continue
            content["versions"][case.library] = library.__version__
            say(f"{key}: {case.library} {case.name}")
            try:
                with mock.patch.object(backend, "INTERPRETED", False):  # on the CPU, as users have it
                    content[key].append(function(case))
            except Exception as error:
                content[key].append({"library": case.library, "model": case.name, "error": f"{error}"[:300]})
                say(f"  {type(error).__name__}: {error}")
            out.write_text(json.dumps(content, indent=1))
    return content
