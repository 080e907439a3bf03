"""``fastreg.convert`` on the models of torchvision, timm and transformers, built small and without weights.

On the CPU both take ATen, masks are the same draws, and results agree to the bit: the blocks compute the same, in the
same order. What the kernels make of it is seen on the smallest of each.
"""

import copy
import importlib

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import fastreg
from fastreg.blocks import FILES, known, swap
from fastreg.blocks.activations import Absorbed


def images(size: int = 64, n: int = 2) -> torch.Tensor:
    return torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(5))


def torchvision(name: str, **arguments):
    models = pytest.importorskip("torchvision.models")
    return models.get_model(name, weights=None, **arguments), images()


def timm(name: str, **arguments):
    return pytest.importorskip("timm").create_model(name, pretrained=False, **arguments), images()


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def transformers(name: str, **arguments):
    library = pytest.importorskip("transformers")
    config = library.AutoConfig.for_model(name, **arguments)
    for token in ("bos_token_id", "eos_token_id"):
        if getattr(config, token, None) is not None:
            setattr(config, token, 1)
    return library.AutoModel.from_config(config)


def tokens(n: int = 2, length: int = 7) -> torch.Tensor:
    return torch.randint(2, 90, (n, length), generator=torch.Generator().manual_seed(6))


def bert(kind="bert", **arguments):
    return transformers(kind, vocab_size=100, **SMALL, **arguments), {"input_ids": tokens()}


def gpt2(**arguments):
    model = transformers("gpt2", n_embd=32, n_layer=2, n_head=2, vocab_size=100, **arguments)
    return model, {"input_ids": tokens()}


def vit(**arguments):
    return transformers("vit", image_size=32, **SMALL, **arguments), {"pixel_values": images(32)}


def whisper(**arguments):
    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    model = transformers(
        "whisper", d_model=32, encoder_ffn_dim=64, decoder_ffn_dim=64, vocab_size=100, max_source_positions=20,
        pad_token_id=0, decoder_start_token_id=1, **sizes, **arguments,
    )  # fmt: skip
    return model, {"input_features": torch.randn(2, 80, 40), "decoder_input_ids": tokens()}


ACT, SUM_ACT, SUM = "norm -> activation", "norm -> add -> activation", "norm -> add"
REUSED, NEXT = "add -> norm, sum reused", "the norm belongs to the next block"
BRANCH = "drop path -> add"

# A model, and how many seams of each kind are fused in it.
MODELS = {
    "torchvision resnet18": (lambda: torchvision("resnet18"), {ACT: 9, SUM_ACT: 8}),
    "torchvision resnet50": (lambda: torchvision("resnet50"), {ACT: 33, SUM_ACT: 16}),
    "torchvision densenet121": (lambda: torchvision("densenet121"), {ACT: 120}),
    "torchvision mobilenet_v2": (lambda: torchvision("mobilenet_v2"), {ACT: 35, SUM: 10}),
    "torchvision mobilenet_v3_small": (lambda: torchvision("mobilenet_v3_small"), {ACT: 23, SUM: 6}),
    "torchvision efficientnet_b0": (lambda: torchvision("efficientnet_b0"), {ACT: 33, BRANCH: 9}),
    "torchvision convnext_tiny": (lambda: torchvision("convnext_tiny"), {BRANCH: 17}),
    "torchvision vit": (
        lambda: torchvision("vit_b_16", image_size=64, dropout=0.1),
        {"activation -> dropout": 12, f"dropout -> {REUSED}": 12, "dropout -> add": 12},
    ),
    "torchvision swin_t": (lambda: torchvision("swin_t"), {REUSED: 1, BRANCH: 22}),
    "torchvision swin_v2_t": (lambda: torchvision("swin_v2_t"), {SUM: 2, BRANCH: 22}),
    "timm resnet18": (lambda: timm("resnet18"), {ACT: 9, SUM_ACT: 8}),
    "timm resnet with stochastic depth": (
        lambda: timm("resnet18", drop_path_rate=0.2),
        {ACT: 9, SUM_ACT: 1, BRANCH: 7},
    ),
    "timm seresnet18": (lambda: timm("resnet18", block_args={"attn_layer": "se"}), {ACT: 9, SUM_ACT: 0}),
    "timm efficientnet_b0": (lambda: timm("efficientnet_b0", drop_path_rate=0.2), {ACT: 33, BRANCH: 9}),
    "timm mobilenetv3": (lambda: timm("mobilenetv3_small_100"), {ACT: 23, SUM: 6}),
    "timm convnext": (lambda: timm("convnext_atto", drop_path_rate=0.2), {BRANCH: 11}),
    "timm convnext with convolutions": (lambda: timm("convnext_atto", conv_mlp=True), {}),
    "timm vit_tiny": (lambda: timm("vit_tiny_patch16_224", img_size=64), {REUSED: 12}),
    "timm vit with dropout": (
        lambda: timm("vit_tiny_patch16_224", img_size=64, proj_drop_rate=0.1, drop_path_rate=0.2),
        {"activation -> dropout": 12, REUSED: 1, BRANCH: 22},
    ),
    "timm swin": (lambda: timm("swin_tiny_patch4_window7_224", img_size=64), {REUSED: 1, BRANCH: 22}),
    "timm mixer": (lambda: timm("mixer_s16_224", img_size=64), {REUSED: 8}),
    "timm regnety": (lambda: timm("regnety_002"), {ACT: 27}),
    "timm densenet": (lambda: timm("densenet121"), {ACT: 121}),
    "transformers bert": (bert, {"dropout -> add -> norm": 4}),
    "transformers roberta": (lambda: bert("roberta"), {"dropout -> add -> norm": 4}),
    "transformers electra": (lambda: bert("electra"), {"dropout -> add -> norm": 4}),
    "transformers gpt2": (gpt2, {REUSED: 2}),
    "transformers vit": (
        lambda: vit(hidden_dropout_prob=0.1), {f"dropout -> {REUSED}": 2, "dropout -> add": 2},
    ),
    "transformers whisper": (
        lambda: whisper(dropout=0.1, activation_dropout=0.1),
        {f"dropout -> {REUSED}": 6, "activation -> dropout": 4, "dropout -> add": 4},
    ),
}  # fmt: skip


def output(model: nn.Module, x) -> torch.Tensor:
    torch.manual_seed(7)
    y = model(**x) if isinstance(x, dict) else model(x)
    return y if isinstance(y, torch.Tensor) else y.last_hidden_state


def everything(model: nn.Module, x) -> dict[str, torch.Tensor]:
    model.train().zero_grad()
    y = output(model, x)
    y.float().square().mean().backward()
    found = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    found |= {name: b.clone() for name, b in model.named_buffers()}
    with torch.no_grad():
        return found | {"output": y.detach(), "in evaluation": output(model.eval(), x)}


@pytest.mark.parametrize("name", MODELS)
def test_models_give_the_same_to_the_bit(name, aten):
    make, fused = MODELS[name]
    model, x = make()
    found = fastreg.explain(model).seams
    counts = {kind: sum(seam["fused"] for seam in found if seam["kind"] == kind) for kind in fused}
    assert counts == fused
    wanted = everything(copy.deepcopy(model), x)
    before = [(type(module), set(vars(module))) for module in model.modules()]
    keys = list(model.state_dict())
    fastreg.convert(model)
    given = everything(model, x)
    assert list(given) == list(wanted)
    assert [name for name in wanted if not torch.equal(given[name], wanted[name])] == []
    assert list(model.state_dict()) == keys
    fastreg.revert(model)
    assert [(type(module), set(vars(module))) for module in model.modules()] == before


@pytest.mark.parametrize(
    "name", ["torchvision resnet18", "timm efficientnet_b0", "timm vit_tiny", "transformers bert"]
)
@pytest.mark.parametrize("what", ["autocast", "channels_last"])
def test_autocast_and_channels_last(name, what, aten):
    """To the bit, too: the additions and the activations see the dtypes and layouts that they saw before."""
    model, x = MODELS[name][0]()
    if what == "channels_last" and isinstance(x, torch.Tensor):
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        wanted = everything(copy.deepcopy(model), x)
        given = everything(fastreg.convert(model), x)
    assert [name for name in wanted if given[name].dtype != wanted[name].dtype] == []
    assert [name for name in wanted if given[name].stride() != wanted[name].stride()] == []
    assert [name for name in wanted if not torch.equal(given[name], wanted[name])] == []


# --- on the kernels ---------------------------------------------------------------------------------------


def block(place: str, *arguments, **keywords):
    module, _, name = place.rpartition(".")
    return getattr(pytest.importorskip(module), name)(*arguments, **keywords)


def inverted():
    return block("timm.models._efficientnet_blocks.InvertedResidual", 8, 8, exp_ratio=2.0, drop_path_rate=0.0)


TINY = {
    "torchvision resnet": lambda: (
        block("torchvision.models.resnet.BasicBlock", 8, 8),
        torch.randn(2, 8, 4, 4),
    ),
    "timm resnet": lambda: (block("timm.models.resnet.Bottleneck", 32, 8), torch.randn(2, 32, 4, 4)),
    "timm efficientnet": lambda: (inverted(), torch.randn(2, 8, 4, 4)),
    "timm convnext": lambda: (block("timm.models.convnext.ConvNeXtBlock", 8), torch.randn(2, 8, 4, 4)),
    "timm vit": lambda: (timm("vit_tiny_patch16_224")[0].blocks[0], torch.randn(2, 5, 192)),
    "torchvision swin": lambda: (torchvision("swin_t")[0].features[1][0], torch.randn(1, 7, 7, 96)),
    "transformers bert": lambda: bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
    "transformers gpt2": lambda: gpt2(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0),
    "transformers vit": vit,
    "transformers whisper": whisper,
}


@pytest.mark.parametrize("name", TINY)
def test_the_kernels_give_the_same(name, device):
    """Without dropout, whose masks are other draws. fp32, by other orders of sums."""
    torch.manual_seed(2)
    model, x = TINY[name]()
    for module in model.modules():
        if hasattr(module, "dropout") and isinstance(module.dropout, float):
            module.dropout = 0.0
    model.to(device)
    x = {key: value.to(device) for key, value in x.items()} if isinstance(x, dict) else x.to(device)
    wanted = everything(copy.deepcopy(model), x)
    given = everything(fastreg.convert(model), x)
    scale = max(1e-3, *(value.abs().max().item() for key, value in wanted.items() if "gradient" in key))
    for key, value in wanted.items():
        at_most = 1e-4 * scale if "gradient" in key else 1e-4
        assert_close(given[key], value, atol=at_most, rtol=1e-3, msg=lambda text, key=key: f"{key}: {text}")


# --- versions ---------------------------------------------------------------------------------------------


def test_another_version_of_a_block_is_left_with_a_line(monkeypatch, aten):
    """What is fused was written for the source of ``forward`` that it replaces."""
    resnet = pytest.importorskip("torchvision.models.resnet")

    def forward(self, x):
        return self.relu(self.bn1(self.conv1(x)))

    monkeypatch.setattr(resnet.BasicBlock, "forward", forward)
    model, x = torchvision("resnet18")
    found = fastreg.explain(model)
    blocks = [layer for layer in found.layers if layer["type"] == "torchvision.BasicBlock"]
    assert {layer["why_not"] for layer in blocks} == {
        "BasicBlock.forward is not the version that fastreg knows"
    }
    assert sum(seam["fused"] for seam in found.seams) == 1  # of the stem
    wanted = output(copy.deepcopy(model).eval(), x)
    fastreg.convert(model)
    assert type(model.layer1[0]) is resnet.BasicBlock
    assert type(model.layer1[0].bn1).__module__.startswith("fastreg")
    assert torch.equal(output(model.eval(), x), wanted)


def test_a_library_without_one_of_the_classes_is_reported(monkeypatch):
    models = pytest.importorskip("torchvision.models")
    import sys

    monkeypatch.delitem(sys.modules, "fastreg.blocks.torchvision", raising=False)
    monkeypatch.delattr(models.swin_transformer, "SwinTransformerBlockV2")
    found = fastreg.explain(nn.Sequential(nn.LayerNorm(3)))
    assert "SwinTransformerBlockV2" in found.unusable["torchvision"]
    assert [layer["becomes"] for layer in found.layers] == ["fastreg.nn.LayerNorm"]


def test_white_space_is_no_version():
    def one(x):
        return x

    assert swap.source_hash(one) != swap.source_hash(known)
    assert swap.source_hash(len) == "no source"


@pytest.mark.parametrize("library", [library for library in FILES if library != "torch"])
def test_this_version_of_a_library_is_known(library):
    """All hashes are those of the version that is installed: a new one shows here, and its blocks are to be read."""
    pytest.importorskip(library.partition(".")[0])
    importlib.import_module(library)
    swaps, unusable = known()
    assert unusable == {}
    package = library.partition(".")[0]
    foreign = {kind.__name__: s.foreign() for kind, s in swaps.items() if kind.__module__.startswith(package)}
    assert {name: method for name, method in foreign.items() if method is not None} == {}


def test_classes_keep_their_names():
    """Tools know blocks by their names: device maps, wrapping policies."""
    for library in FILES:
        pytest.importorskip(library.partition(".")[0])
        importlib.import_module(library)
    swaps, _ = known()
    other = {
        kind.__name__: s.ours.__name__
        for kind, s in swaps.items()
        if s.ours and s.ours.__name__ != kind.__name__
    }
    assert other == {}
    assert all(issubclass(s.ours, kind) for kind, s in swaps.items() if s.ours is not None)


# --- what is done to blocks afterwards --------------------------------------------------------------------


def test_hooks_that_come_later_see_what_they_saw_before(aten):
    """A layer with a hook is called as ever, in a block that could do without the call."""
    plain, x = bert(hidden_dropout_prob=0.0)
    model = fastreg.convert(copy.deepcopy(plain))
    seen: dict[str, list] = {"plain": [], "converted": []}
    for key, one in (("plain", plain), ("converted", model)):
        for layer in one.modules():
            if isinstance(layer, (nn.LayerNorm, nn.Dropout)):
                layer.register_forward_hook(lambda m, args, y, to=seen[key]: to.append((type(m).__name__, y)))
        output(one.eval(), x)
    assert [name for name, _ in seen["converted"]] == [name for name, _ in seen["plain"]]
    assert all(torch.equal(y, z) for (_, y), (_, z) in zip(*seen.values(), strict=True))


def test_a_hook_on_the_activation_inside_a_norm(aten):
    plain, x = timm("mobilenetv3_small_100")
    model = fastreg.convert(copy.deepcopy(plain))
    seen = []
    for one in (plain, model):
        one.bn1.act.register_forward_hook(lambda m, args, y: seen.append(args[0].clone()))
        output(one.eval(), x)
    assert torch.equal(*seen)


class Adapter(nn.Module):
    """What PEFT puts around a layer."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer
        self.gain = nn.Parameter(torch.tensor(0.5))

    def forward(self, x):
        return self.base_layer(x) * self.gain


@pytest.mark.parametrize("first", ["convert", "adapt"])
def test_adapters_around_layers(first, aten):
    def adapted(model):
        for layer in model.encoder.layer:
            for place in (layer.attention.output, layer.output):
                place.LayerNorm, place.dense = Adapter(place.LayerNorm), Adapter(place.dense)
        return model

    model, x = bert()
    wanted = everything(adapted(copy.deepcopy(model)), x)
    model = adapted(fastreg.convert(model)) if first == "convert" else fastreg.convert(adapted(model))
    given = everything(model, x)
    assert [name for name in wanted if not torch.equal(given[name], wanted[name])] == []


def test_timms_synchronized_norms_keep_their_activation(aten):
    library = pytest.importorskip("timm.layers")
    model, x = timm("efficientnet_b0")
    wanted = output(model.eval(), x)
    model = library.convert_sync_batchnorm(fastreg.convert(model))
    assert_close(output(model.eval(), x), wanted)
    fastreg.convert(model)
    assert type(model.bn1).__module__ == "fastreg.blocks.timm"
    assert_close(output(model.eval(), x), wanted)


def test_torchs_synchronized_norms_in_a_block(aten):
    model, x = torchvision("resnet18")
    wanted = output(model.eval(), x)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(fastreg.convert(model))
    assert_close(output(model.eval(), x), wanted)


def test_probabilities_that_change_later_count(aten):
    plain, x = timm("vit_tiny_patch16_224", img_size=64, drop_path_rate=0.1)
    model = fastreg.convert(copy.deepcopy(plain))
    for one in (plain, model):
        for block in one.blocks[1:]:
            block.drop_path1.drop_prob = 0.7
    assert torch.equal(output(plain.train(), x), output(model.train(), x))


def test_hidden_states_are_recorded(aten):
    plain, x = bert()
    model = fastreg.convert(copy.deepcopy(plain))
    for one in (plain, model):
        one.eval()
    wanted, given = (one(**x, output_hidden_states=True).hidden_states for one in (plain, model))
    assert len(wanted) == len(given) == 3
    assert all(map(torch.equal, wanted, given))


def test_frozen_norms(aten):
    ops = pytest.importorskip("torchvision.ops")
    norm = ops.FrozenBatchNorm2d(4)
    norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2), norm.weight.normal_(), norm.bias.normal_()
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU())
    x = images(8)
    for dtype in (torch.float32, torch.bfloat16):
        y = torch.randn(2, 4, 5, 5, dtype=dtype)
        wanted = copy.deepcopy(norm)(y)
        given = fastreg.convert(copy.deepcopy(norm))(y)
        assert given.dtype == wanted.dtype
        assert_close(given, wanted)
    wanted = everything(copy.deepcopy(model), x)
    fastreg.convert(model)
    assert (type(model[1]).__module__, type(model[2])) == ("fastreg.blocks.torchvision", Absorbed)
    for name, value in everything(model, x).items():
        assert_close(value, wanted[name])


def test_modes_and_forms_without_a_kernel_stay(aten):
    ops, layers = pytest.importorskip("torchvision.ops"), pytest.importorskip("timm.layers")
    fast = layers.LayerNorm(4)
    fast._fast_norm = True
    model = nn.Sequential(ops.StochasticDepth(0.5, "batch"), layers.DropPath(0.5, scale_by_keep=False), fast)
    found = fastreg.explain(model).layers
    assert [layer["why_not"] for layer in found] == [
        "mode='batch' drops whole batches, which no kernel does",
        "scale_by_keep=False",
        "timm's fast norm is switched on",
    ]


@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_a_hook_that_comes_later_changes_no_result(library, aten):
    """The norm in front of an addition has the activation behind it, and cannot be called without the sum."""
    plain, x = MODELS[f"{library} resnet18"][0]()
    model = fastreg.convert(copy.deepcopy(plain))
    for one in (plain, model):
        for module in one.modules():
            if isinstance(module, (nn.BatchNorm2d, nn.ReLU)):
                module.register_forward_hook(lambda *_: None)
    wanted, given = everything(plain, x), everything(model, x)
    assert [name for name in wanted if not torch.equal(given[name], wanted[name])] == []


def test_norms_with_an_activation_of_their_own(aten):
    """Made ours by the user, with an activation: the block adds behind that."""
    from fastreg import nn as fnn

    def norm(channels):
        return fnn.BatchNorm2d(channels, activation="tanh")

    for place in ("torchvision.models.resnet.BasicBlock", "torchvision.models.mobilenetv2.InvertedResidual"):
        more = {"expand_ratio": 2, "stride": 1} if "mobile" in place else {}
        plain = block(place, 8, 8, norm_layer=norm, **more)
        x = torch.randn(2, 8, 4, 4)
        with torch.no_grad():  # the block adds in place, which tanh does not allow
            wanted = output(copy.deepcopy(plain), x)
            assert torch.equal(output(fastreg.convert(plain), x), wanted)


# --- statistics and folding -------------------------------------------------------------------------------

FOLDED = {  # and how many stay as an affine map, behind no convolution or behind one with more than one reader
    "torchvision resnet18": 0,
    "torchvision efficientnet_b0": 0,
    "torchvision mobilenet_v3_small": 0,
    "torchvision densenet121": 62,
    "timm resnet18": 0,
    "timm efficientnet_b0": 0,
    "timm mobilenetv3": 0,
}


@pytest.mark.parametrize("name", FOLDED)
def test_statistics_and_folding(name, aten):
    plain, x = MODELS[name][0]()
    model = fastreg.convert(copy.deepcopy(plain))
    batches = [x, images(64, 3)]
    for one in (plain, model):
        fastreg.update_bn(one, batches)
    assert all(map(torch.equal, model.buffers(), plain.buffers()))
    for module in model.modules():  # trained ones are not that even
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, 0, 0.1)
    model.eval().double()  # untrained networks are chaotic: roundings grow to percents
    folded = fastreg.fold_batch_norm(model)
    names = [type(module).__name__ for module in folded.modules()]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert names.count("ChannelAffine") == FOLDED[name]
    wanted = output(model, x.double())
    assert_close(output(folded, x.double()), wanted, atol=1e-6 * wanted.abs().max().item(), rtol=1e-6)


@pytest.mark.parametrize("name", ["torchvision vit", "timm swin", "transformers bert"])
def test_monte_carlo_dropout(name, aten):
    plain, x = MODELS[name][0]()
    model = fastreg.convert(copy.deepcopy(plain))
    found = []
    for one in (plain, model):
        with fastreg.mc_dropout(one), torch.no_grad():
            found.append(output(one, x))
    if name == "timm swin":  # its own class of stochastic depth is known to us once it is converted
        assert not torch.equal(found[1], output(model.eval(), x))
    else:
        assert torch.equal(*found)


# --- compiled ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "torchvision resnet18",
        "torchvision swin_t",
        "timm efficientnet_b0",
        "timm vit_tiny",
        "transformers bert",
    ],
)
def test_compiled_blocks_are_one_graph(name, aten):
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    model, x = MODELS[name][0]()
    fastreg.convert(model).eval()
    counter = CompileCounterWithBackend("eager")
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    with torch.no_grad():
        assert torch.equal(output(compiled, x), output(model, x))
    assert counter.frame_count == 1


def test_a_trace_finds_what_the_files_of_libraries_do_not_know(aten):
    """Of MONAI, and of a block of torchvision whose file says nothing of it."""
    model, x = torchvision("shufflenet_v2_x0_5")
    wanted = everything(copy.deepcopy(model), x)
    before = sum(seam["fused"] for seam in fastreg.explain(model).seams)
    found = sum(seam["fused"] for seam in fastreg.explain(model, fuse="trace").seams)
    assert found >= before > 0
    given = everything(fastreg.convert(model, fuse="trace"), x)
    assert [name for name in wanted if not torch.equal(given[name], wanted[name])] == []


@pytest.mark.parametrize(
    "name",
    [
        "torchvision resnet18",
        "torchvision vit",
        "torchvision swin_t",
        "timm efficientnet_b0",
        "timm vit_tiny",
    ],
)
def test_features_are_extracted(name, aten):
    """torch.fx traces the blocks, whose layers stay nodes: torchvision's and timm's feature extraction."""
    extraction = pytest.importorskip("torchvision.models.feature_extraction")
    model, x = MODELS[name][0]()
    plain = copy.deepcopy(model).eval()
    fastreg.convert(model).eval()
    nodes = extraction.get_graph_node_names(plain)[1]
    chosen = [node for node in nodes if node.endswith(("conv2", "norm1", "norm2", "ln_1", "mlp"))][
        :6
    ] + nodes[-1:]
    wanted, given = (extraction.create_feature_extractor(one, chosen)(x) for one in (plain, model))
    assert list(given) == list(wanted)
    assert all(torch.equal(given[node], wanted[node]) for node in wanted)
