"""What people do with a model, done with a converted one: torch's tools, ours, and those of other libraries."""

import copy

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

import fastreg
import fastreg.nn as fnn
from fastreg import optim
from fastreg.blocks.activations import Absorbed

pytestmark = pytest.mark.usefixtures("aten")


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.SiLU(inplace=True)),
        nn.Flatten(),
        nn.Linear(16, 8),
        nn.GELU(),
        nn.Dropout(0.2),
        nn.LayerNorm(8),
        nn.Linear(8, 2),
    )


def images(n: int = 5) -> torch.Tensor:
    return torch.randn(n, 3, 4, 4, generator=torch.Generator().manual_seed(n))


def gradients(model: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    torch.manual_seed(1)
    model(x).square().sum().backward()
    return [p.grad for p in model.parameters()]


def pair() -> tuple[nn.Module, nn.Module]:
    """A model, and its converted copy."""
    model = network()
    return model, fastreg.convert(copy.deepcopy(model))


# --- torch ------------------------------------------------------------------------------------------------


def test_hooks_fire_in_the_same_order():
    fired: dict[bool, list] = {}
    for converted in (False, True):
        model = network()
        calls = fired[converted] = []

        def note(event, to=calls):
            return lambda module, *_: to.append((event, module.number))  # noqa: B023

        model[0][2] = nn.SiLU()  # torch refuses full backward hooks around what works in place
        for number, module in enumerate(model.modules()):
            module.number = number
            module.register_forward_pre_hook(note("before"))
            module.register_forward_hook(note("after"))
            module.register_full_backward_hook(note("backward"))
            module.register_state_dict_pre_hook(
                lambda m, prefix, keep, to=calls: to.append(("save", m.number))
            )
            module.register_load_state_dict_pre_hook(lambda m, *_, to=calls: to.append(("load", m.number)))
        if converted:
            fastreg.convert(model)
        gradients(model, images())
        model.load_state_dict(model.state_dict())
    assert fired[True] == fired[False]
    assert len(fired[True]) > 40


def test_hooks_that_come_after_the_conversion_fire_too():
    model, converted = pair()
    names: list[list] = [[], []]
    for one, to in zip((model, converted), names, strict=True):
        for name, module in one.named_modules():
            module.register_forward_hook(lambda m, args, y, name=name, to=to: to.append(name))
        one(images())
    assert names[0] == names[1]


@pytest.mark.parametrize("norm_first", [False, True])
def test_the_fast_path_of_transformer_layers(norm_first):
    """In evaluation torch reads the parameters of a layer's children and does not call them."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True, norm_first=norm_first)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    x = torch.randn(3, 5, 8)
    torch.manual_seed(1)
    wanted = gradients(copy.deepcopy(model), x)
    with torch.no_grad():
        inferred = model.eval()(x)
    fastreg.convert(model)
    with torch.no_grad():
        assert_close(model(x), inferred)
        found = [module.activation for module in model.modules() if isinstance(module, fnn.LayerNorm)]
    assert found == [None] * 4
    for grad, value in zip(gradients(model.train(), x), wanted, strict=True):
        assert_close(grad, value)


def test_quantizations_fusion_refuses_and_works_after_revert():
    from torch.ao.quantization import fuse_modules

    model, converted = pair()
    names = [["0.0", "0.1", "0.2"]]
    model[0][2] = converted[0][2] = nn.ReLU()
    converted = fastreg.convert(fastreg.revert(converted))
    model.eval(), converted.eval()
    with pytest.raises((NotImplementedError, AssertionError), match=r"(?i)cannot fuse modules|fuser method"):
        fuse_modules(converted, names)
    fused = fuse_modules(fastreg.revert(converted), names)
    assert_close(fused(images()), model(images()))


@pytest.mark.parametrize("training", [True, False])
def test_compilation_has_one_graph_for_all_batches(training):
    """Dynamo makes two graphs of batch normalization in training for the first batch, with torch's layer as well."""
    model, converted = pair()
    model.train(training), converted.train(training)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(converted, backend=counter, fullgraph=True, dynamic=True)
    compilations = []
    for n in (5, 7, 11):
        torch.manual_seed(n)
        wanted = model(images(n))
        torch.manual_seed(n)
        assert_close(compiled(images(n)), wanted)
        compilations.append(counter.frame_count)
    assert compilations[1:] == compilations[-1:] * 2
    assert compilations[-1] <= 1 + training
    with pytest.raises(RuntimeError, match="convert first, then compile"):
        fastreg.convert(compiled)


def test_a_conversion_behind_a_compiled_wrapper_compiles_anew():
    """Dynamo looks at the classes of modules."""
    model = network().eval()
    compiled = torch.compile(model, backend="eager")
    wanted = compiled(images())
    fastreg.convert(model)
    assert_close(compiled(images()), wanted)
    fastreg.revert(model)
    assert_close(compiled(images()), wanted)


def test_export():
    model, converted = pair()
    converted.eval(), model.eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(converted, (images(),), dynamic_shapes=({0: batch},))
    assert_close(exported.module()(images(9)), model(images(9)))


def test_onnx(tmp_path):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxscript")
    _, converted = pair()
    program = torch.onnx.export(converted.eval(), (images(),), dynamo=True)
    assert {node.op_type for node in program.model.graph} >= {"Conv", "LayerNormalization"}


def test_traces():
    model, converted = pair()
    traced = torch.jit.trace(converted.eval(), images())
    assert_close(traced(images(9)), model.eval()(images(9)))
    graph = torch.fx.symbolic_trace(converted)
    assert_close(graph(images()), model(images()))


def test_gradient_checkpointing():
    model, converted = pair()

    class Checkpointed(nn.Module):
        def __init__(self, layers):
            super().__init__()
            self.layers = layers

        def forward(self, x):
            return checkpoint(self.layers, x, use_reentrant=False)

    for grad, wanted in zip(
        gradients(Checkpointed(converted), images()), gradients(model, images()), strict=True
    ):
        assert_close(grad, wanted)


def test_functional_calls_and_transforms():
    model, converted = pair()
    model.eval(), converted.eval()
    parameters = {name: 2 * p.detach() for name, p in model.named_parameters()}
    wanted = torch.func.functional_call(model, parameters, (images(),))
    assert_close(torch.func.functional_call(converted, parameters, (images(),)), wanted)

    def loss(parameters, one):
        return torch.func.functional_call(converted, parameters, (one.unsqueeze(0),)).square().sum()

    each = torch.vmap(torch.func.grad(loss), in_dims=(None, 0))(parameters, images())
    total = torch.func.grad(lambda p: torch.func.functional_call(model, p, (images(),)).square().sum())(
        parameters
    )
    for name, value in total.items():
        assert_close(each[name].sum(0), value, atol=1e-4, rtol=1e-4)


def test_averaged_models():
    model, converted = pair()
    averages = [AveragedModel(model), AveragedModel(converted)]
    for one, average in zip((model, converted), averages, strict=True):
        with torch.no_grad():
            for p in one.parameters():
                p.mul_(1.5)
        average.update_parameters(one)
    assert_close(averages[1].eval()(images()), averages[0].eval()(images()))


def test_optimizers_and_averages_keep_their_references():
    model = network()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    average = fastreg.ExponentialMovingAverage(model, decay=0.5)
    other = copy.deepcopy(model)
    expected = torch.optim.AdamW(other.parameters(), lr=0.1)
    fastreg.convert(model)
    for one, step in ((model, optimizer), (other, expected)):
        gradients(one, images())
        step.step()
    average.update()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(p, q)
    with average.applied():
        model(images())


def job_ddp(rank: int, wrap: str):
    """Gradients of a converted model, over two processes, and of a plain one over the whole batch."""
    model, converted = pair()
    for one in (model, converted):
        for module in one.modules():
            if isinstance(module, (nn.Dropout, nn.BatchNorm2d)):
                module.eval()
    wanted = gradients(model, images(6))
    if wrap == "ddp":
        wrapped = DistributedDataParallel(converted)
    else:
        mesh = dist.init_device_mesh("cpu", (2,))
        wrapped = fully_shard(converted, mesh=mesh)
        with pytest.raises(RuntimeError, match="convert first, then shard"):
            fastreg.convert(wrapped)
    wrapped(images(6)[rank::2]).square().sum().backward()
    found = [p.grad if wrap == "ddp" else p.grad.full_tensor() for p in wrapped.parameters()]
    for grad, value in zip(found, wanted, strict=True):
        assert_close(2 * grad, value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("wrap", ["ddp", "fsdp"])
def test_parallel_training(wrap, processes):
    processes(2)(job_ddp, "aten", wrap)


# --- ours -------------------------------------------------------------------------------------------------


def test_population_statistics():
    model, converted = pair()
    for one in (model, converted):
        fastreg.update_bn(one, [images(6), images(8)])
    assert_close(converted[0][1].running_var, model[0][1].running_var)


@pytest.mark.parametrize("order", ["convert, then fold", "fold, then convert"])
def test_folding(order):
    model, converted = pair()
    for one in (model, converted):
        fastreg.update_bn(one, [images(6), images(8)])
        one.eval()
    if order == "convert, then fold":
        folded = fastreg.fold_batch_norm(converted)
    else:
        folded = fastreg.convert(fastreg.fold_batch_norm(model))
    assert not any(isinstance(module, nn.BatchNorm2d) for module in folded.modules())
    assert_close(folded(images()), model(images()))


def test_monte_carlo_dropout():
    model, converted = pair()
    samples = []
    for one in (model, converted):
        torch.manual_seed(2)
        with fastreg.mc_dropout(one):
            samples.append(torch.stack([one(images()) for _ in range(3)]))
    assert_close(samples[1], samples[0])
    assert samples[0].std(0).min() > 0


class Backwards(nn.Module):
    """Convolution, activation, norm, in this order."""

    def __init__(self):
        super().__init__()
        self.conv, self.relu, self.norm = nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.norm(self.relu(self.conv(x)))


def test_a_norm_behind_an_activation_is_not_folded_into_what_is_before_it():
    """Neither by names nor by neighbourhood, which is how such networks were folded wrong."""
    for model in (Backwards(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4))):
        fastreg.update_bn(model, [images(6), images(8)])
        model.eval()
        wanted = model(images())
        fastreg.convert(model)
        assert not any(isinstance(module, Absorbed) for module in model.modules())
        weight = next(model.parameters()).clone()
        folded = fastreg.fold_batch_norm(model)
        assert torch.equal(next(folded.parameters()), weight)
        assert_close(folded(images()), wanted)


def test_folding_of_torchcrepe():
    torchcrepe = pytest.importorskip("torchcrepe")
    model = torchcrepe.Crepe("tiny").eval()
    x = torch.randn(2, 1024)
    wanted = model(x)
    fastreg.convert(model)
    assert_close(model(x), wanted)
    assert_close(fastreg.fold_batch_norm(model)(x), wanted, atol=1e-5, rtol=1e-4)


# --- optimizers -------------------------------------------------------------------------------------------

OPTIMIZERS = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "SGD damped": {"lr": 0.1, "momentum": 0.9, "dampening": 0.3},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "Adam fused": {"lr": 0.01, "fused": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
}


@pytest.mark.filterwarnings("error:.*learning rate scheduler", "error:.*lr_scheduler")
@pytest.mark.parametrize("after", [0, 2])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_an_optimizer_goes_on_as_ours(name, after):
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    other = copy.deepcopy(model)
    kind = getattr(torch.optim, name.split()[0])

    def made(one):
        return kind([{"params": [one.weight]}, {"params": [one.bias], "lr": 0.001}], **OPTIMIZERS[name])

    optimizer, expected = made(model), made(other)
    scheduler, expected_scheduler = (torch.optim.lr_scheduler.StepLR(o, 2) for o in (optimizer, expected))
    steps = []
    optimizer.register_step_pre_hook(lambda *_: steps.append("before"))
    groups = optimizer.param_groups
    for i in range(5):
        if i == after:
            assert fastreg.convert_optimizer(optimizer) is optimizer
            assert type(optimizer) is getattr(optim, name.split()[0])
            assert optimizer.param_groups is groups
        for one, step, schedule in ((model, optimizer, scheduler), (other, expected, expected_scheduler)):
            gradients(one, torch.ones(2, 4))
            step.step()
            schedule.step()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert_close(p, q)
    assert len(steps) == 5
    assert fastreg.convert_optimizer(optimizer) is optimizer
    for key, value in expected.state_dict()["state"].items():
        assert_close(optimizer.state_dict()["state"][key], value)
    optimizer.param_groups[0]["max_norm"] = 0.5
    gradients(model, torch.ones(2, 4))
    optimizer.step()
    assert model.weight.norm() < 0.5 + 1e-5


def test_an_optimizer_of_another_kind_is_refused():
    model = nn.Linear(2, 2)

    class Own(torch.optim.SGD):
        pass

    for optimizer in (torch.optim.RMSprop(model.parameters()), Own(model.parameters())):
        with pytest.raises(TypeError, match=r"expected one of torch.optim.SGD, .* but got a"):
            fastreg.convert_optimizer(optimizer)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.step = lambda: None
    with pytest.raises(RuntimeError, match="step was replaced"):
        fastreg.convert_optimizer(optimizer)
    assert type(optimizer) is torch.optim.SGD


# --- clients ----------------------------------------------------------------------------------------------


def classifier():
    library = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = library.BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return library.BertForSequenceClassification(config)


def test_the_trainer_of_transformers(tmp_path):
    """Trainer(optimizers=...) takes ours, and a converted model; losses are those of torch's, to fp32's rounding."""
    pytest.importorskip("accelerate")
    library = pytest.importorskip("transformers")
    tokens = torch.randint(0, 50, (8, 6), generator=torch.Generator().manual_seed(1))
    data = [{"input_ids": row, "labels": torch.tensor(i % 2)} for i, row in enumerate(tokens)]
    losses = []
    for ours in (False, True):
        model = classifier()
        if ours:
            fastreg.convert(model)
        optimizer = (optim if ours else torch.optim).AdamW(model.parameters(), lr=1e-3)
        arguments = library.TrainingArguments(
            str(tmp_path), max_steps=3, per_device_train_batch_size=4, use_cpu=True, report_to=[], disable_tqdm=True,
            save_strategy="no", logging_strategy="no", seed=3,
        )  # fmt: skip
        trainer = library.Trainer(model, arguments, train_dataset=data, optimizers=(optimizer, None))
        losses.append(trainer.train().training_loss)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize("first", ["convert", "adapt"])
def test_lora(first):
    peft = pytest.importorskip("peft")
    x = {"input_ids": torch.randint(0, 50, (3, 6)), "labels": torch.tensor([0, 1, 0])}
    found = []
    for ours in (False, True):
        model = classifier()
        if ours and first == "convert":
            fastreg.convert(model)
        torch.manual_seed(1)
        config = peft.LoraConfig(target_modules=["query", "dense"], r=2, modules_to_save=["LayerNorm"])
        model = peft.get_peft_model(model, config)
        if ours and first == "adapt":
            fastreg.convert(model)
        torch.manual_seed(2)
        model(**x).loss.backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert list(found[0]) == list(found[1])
    for name, grad in found[0].items():
        assert_close(found[1][name], grad, msg=lambda text, name=name: f"{name}: {text}")


def test_accelerate_prepares_a_converted_model():
    accelerate = pytest.importorskip("accelerate")
    model, converted = pair()
    optimizer = fastreg.convert_optimizer(torch.optim.AdamW(converted.parameters(), lr=0.1))
    accelerator = accelerate.Accelerator(cpu=True)
    prepared, optimizer = accelerator.prepare(converted, optimizer)
    torch.manual_seed(1)
    accelerator.backward(prepared(images()).square().sum())
    optimizer.step()
    expected = torch.optim.AdamW(model.parameters(), lr=0.1)
    gradients(model, images())
    expected.step()
    for p, q in zip(converted.parameters(), model.parameters(), strict=True):
        assert_close(p, q, atol=1e-5, rtol=1e-4)


# --- the command ------------------------------------------------------------------------------------------


def run(*arguments: str) -> tuple[int, str]:
    import typer
    from typer.testing import CliRunner

    from fastreg.conversion.command import convert

    app = typer.Typer()
    app.command()(convert)
    done = CliRunner().invoke(app, list(arguments))
    return done.exit_code, done.output


def test_the_command_explains_a_function_of_a_file(tmp_path):
    import json

    file = tmp_path / "mine.py"
    file.write_text(
        "from torch import nn\n\ndef model():\n    return nn.Sequential(nn.BatchNorm2d(3), nn.ReLU())\n\nnumber = int\n"
    )
    code, text = run(f"{file}:model")
    assert (code, "1 of 1 layers are converted, 1 of 1 seams fused" in text) == (0, True)
    code, text = run(f"{file}:model", "--json", "--example", "2x3x4x4")
    assert json.loads(text)["seams"][0]["bytes"] == 5 * 4 * 96
    for spec, message in {
        f"{file}:other": "cannot import 'other'",
        f"{tmp_path}/none.py:model": "there is no file",
        f"{file}:number": "returned a int",
        "resnet50": "cannot read 'resnet50'",
    }.items():
        code, text = run(spec)
        assert (code, message in text) == (2, True), text
    code, text = run(f"{file}:model", "--example", "2xa")
    assert (code, "cannot read the shape '2xa'" in text) == (2, True)


@pytest.mark.parametrize("spec", ["timm/resnet18", "torchvision/resnet18"])
def test_the_command_knows_the_models_of_libraries(spec):
    library, _, _ = spec.partition("/")
    pytest.importorskip(library)
    code, text = run(spec)
    assert (code, "28 of 28 layers are converted, 17 of 17 seams fused" in text) == (0, True)
    code, text = run(f"{library}/no_such_model")
    assert (code, f"{library} has no model 'no_such_model'" in text) == (2, True)
