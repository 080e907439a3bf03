"""The command `fastreg train`: runs, studies, interruptions, several processes, and its words on bad input."""

import dataclasses
import functools
import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from training_runs import ALONE, APP, quick_settings, write_idx_folder
from typer.testing import CliRunner

import fastreg.nn as fnn
from fastreg.training import data
from fastreg.training.display import Display
from fastreg.training.errors import InputError
from fastreg.training.loop import Trial
from fastreg.training.run_folder import replace
from fastreg.training.settings import Settings
from fastreg.training.studies import STUDIES, study

pytestmark = pytest.mark.usefixtures("aten")  # a training run takes too long in the interpreter
QUICK = ["--data", "digits", "--epochs", "3", "--seeds", "1"]


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


# Models of libraries -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def digits():
    return data.load("digits")


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
