"""The benchmark suite itself, on a CPU: sweep, statistics, result files, report, dry run of the check."""

import contextlib
import dataclasses
import gc
import itertools
import json
import os
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

from fastreg.bench import __main__ as command
from fastreg.bench import check, harness, host, idle_gpu, networks, pieces, provenance, report, steps
from fastreg.bench.cases import Case, images, masked, random, rows
from fastreg.bench.check import Stage, run_stage, stages
from fastreg.bench.peers import PEERS, Peer, library, select

ROOT = provenance.REPOSITORY


def halve(x):
    return torch.nn.functional.dropout(x, 0.5)


def a_case(ours=halve, **changes) -> Case:
    fields = {
        "name": "toy",
        "inputs": random(rows),
        "ours": ours,
        "torch": halve,
        "forward_bytes": lambda e: 2 * e,
        "backward_bytes": lambda e: 2 * e,
        "check": masked(0.5, lambda x: x / 0.5, torch.zeros_like),
    }
    return Case(**fields | changes)


def a_peer(name, build, **more) -> Peer:
    return Peer(name, lambda: "1.0", build, **more)


OURS = a_peer("fastreg", lambda case: case.ours)
TORCH = a_peer("torch", lambda case: case.torch)


def sweep(folder, *peers, case=None, **options):
    settings = {"dtype": "fp32", "sizes": [4096, 8192], "device": torch.device("cpu"), "budget": 1e-3}
    versions = {peer.name: peer.probe() for peer in peers}
    path = harness.run(
        "toys", [case or a_case()], peers, versions=versions, folder=folder, **settings | options
    )
    return path, json.loads(path.read_text())


# --- statistics and timing ----------------------------------------------------------------------------------


def test_summary_takes_quantiles_of_the_samples():
    found = harness.summary(n * 1e-6 for n in range(101))
    assert found["n"] == 101
    assert [found[key] for key in ("min_us", "p20_us", "median_us", "p80_us")] == pytest.approx(
        [0, 20, 50, 80]
    )


class Ticking:
    """A clock that stands still except in ``work``, which takes the next of the given durations."""

    def __init__(self, *durations):
        self.now, self.durations = 0.0, itertools.cycle(durations)

    def __call__(self):
        return self.now

    def work(self):
        self.now += next(self.durations)


def test_the_host_clock_times_each_call_and_keeps_the_budget():
    tick = 1 / 64  # exact in binary
    clock = Ticking(tick)
    samples = harness.Cpu(clock).perf_counter(lambda: clock.work, budget=8 * tick)
    assert samples == [tick] * 8
    assert clock.now == (1 + 2 + 8) * tick  # the first call, a quarter of the budget to warm up, the samples


def test_slow_calls_are_still_repeated():
    clock = Ticking(1.0)
    assert len(harness.Cpu(clock).perf_counter(lambda: clock.work, budget=0.1)) == harness.MINIMUM


def test_interleaved_ratio_is_blind_to_a_drifting_machine():
    clock = Ticking(1)
    drift = itertools.count()

    def task(cost):
        def call():
            clock.now += cost * (1 + next(drift) / 100)

        return call

    assert harness.interleaved(task(1.05), task(1.0), clock=clock) == pytest.approx(1.05, rel=0.01)


def test_time_limit_stops_a_hanging_peer():
    with pytest.raises(TimeoutError), harness.time_limit(0.05):
        time.sleep(5)


# --- cases --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shape", "unit", "function", "complaint"),
    [
        (rows, None, lambda x: torch.nn.functional.dropout(x, 0.5), None),
        (images, 2, lambda x: torch.nn.functional.dropout2d(x, 0.5), None),
        (rows, None, lambda x: torch.nn.functional.dropout(x, 0.4), "neither"),
        (rows, None, lambda x: torch.nn.functional.dropout(x, 0.4) * 1.2, "drop rate"),
        (rows, None, lambda x: x * 2, "drop rate"),
        (images, 2, lambda x: torch.nn.functional.dropout(x, 0.5), "unit"),
        (rows, None, lambda x: (halve(x) - halve(x)).detach() + halve(x), "neither"),
        (rows, None, lambda x: halve(x.detach()) + (x - x.detach()), "gradient"),
        (rows, None, lambda x: torch.nn.functional.dropout(x, 0.5).double(), "float64"),
    ],
)
def test_the_mask_check_sees_what_is_wrong(dtype, shape, unit, function, complaint):
    case = a_case(
        function, check=masked(0.5, lambda x: x / 0.5, torch.zeros_like, unit), inputs=random(shape)
    )
    found = harness.wrong(case, case.ours, case.inputs(2**17, dtype, torch.device("cpu")))
    assert found is None if complaint is None else complaint in found


def test_floor_counts_bytes_of_the_first_input():
    case = a_case(forward_bytes=lambda e: 3 * e, backward_bytes=lambda e: e + 1 / 8)
    x = torch.empty(8, 100, dtype=torch.bfloat16)
    assert [case.floor(d, x) for d in ("forward", "backward", "both")] == [4800, 1700, 6500]


def test_shapes_cover_every_size():
    assert rows(3) == (1, 3)
    assert rows(2**20) == (256, 4096)
    assert images(2**11) == (1, 2, 32, 32)
    assert images(2**20) == (4, 256, 32, 32)


# --- peers --------------------------------------------------------------------------------------------------


def test_absent_peers_are_named_with_the_reason():
    found, versions = select(table=(TORCH, library("no_such_library")))
    assert found == [TORCH]
    assert versions["no_such_library"].startswith("absent: PackageNotFoundError")


def test_the_list_says_what_to_install(monkeypatch):
    peer = library("no_such_library", "no-such-package==1.0", "another")
    monkeypatch.setattr(command, "PEERS", (peer,))
    monkeypatch.setattr(command, "select", lambda: select(table=(peer,)))
    shown = CliRunner().invoke(command.app, ["list"]).output
    assert (
        "No package metadata was found for no-such-package (pip install no-such-package==1.0 another)"
        in shown
    )


def test_unknown_peers_are_refused():
    with pytest.raises(ValueError, match="nonsense"):
        select(("nonsense",))


def test_the_table_of_peers_has_us_and_torch_first():
    assert [peer.name for peer in PEERS][:2] == ["fastreg", "torch"]


# --- the sweep ----------------------------------------------------------------------------------------------


def test_sweep_writes_a_result_file(tmp_path):
    path, document = sweep(tmp_path, OURS, TORCH)
    origin = document["provenance"]
    assert path.name == f"toys-fp32-{origin['date'][:10]}-{origin['commit']}.json"
    assert document["complete"]
    assert origin["slug"] == "cpu"
    assert {"torch", "triton", "fastreg", "commit", "dirty", "date", "cpu", "command", "source"} <= set(
        origin
    )
    assert len(document["rows"]) == 2 * 3 * 2  # sizes, directions, implementations
    for row in document["rows"]:
        assert row["error"] is None
        assert row["method"] == "perf_counter"
        assert 0 < row["min_us"] <= row["p20_us"] <= row["median_us"] <= row["p80_us"]
        assert row["gbps"] is row["of_floor"] is row["of_copy"] is None  # a CPU makes no claims
    assert [row["bytes"] for row in document["rows"]] == [8192] * 6 + [4096] * 6


def failing_once_checked():
    calls = itertools.count()

    def function(x):
        if next(calls) >= 2:
            raise RuntimeError("cannot\nbe captured")
        return halve(x)

    return function


def without_memory(calls_that_fit):
    """A function that a GPU of 80 GB has no room for, at once or after some calls."""
    calls = itertools.count()

    def function(x):
        if next(calls) >= calls_that_fit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 34.36 GiB.")
        return halve(x)

    return function


OUT_OF_MEMORY = "OutOfMemoryError: CUDA out of memory. Tried to allocate 34.36 GiB."


@pytest.mark.parametrize(
    ("build", "error"),
    [
        (lambda case: 1 / 0, "ZeroDivisionError: division by zero"),
        (lambda case: without_memory(0), OUT_OF_MEMORY),
        (lambda case: without_memory(2), OUT_OF_MEMORY),
        (lambda case: lambda x: x * 3, "wrong: "),
        (lambda case: failing_once_checked(), "RuntimeError: cannot be captured"),
        (lambda case: lambda x: time.sleep(5), "TimeoutError: took more than"),
    ],
)
def test_a_bad_peer_is_recorded_and_leaves_the_others(tmp_path, build, error):
    _, document = sweep(tmp_path, OURS, a_peer("bad", build), TORCH, sizes=[4096], limit=0.3)
    bad = [row for row in document["rows"] if row["implementation"] == "bad"]
    assert bad
    assert all(row["error"].startswith(error) and row["median_us"] is None for row in bad)
    assert len([row for row in document["rows"] if row["error"] is None]) == 6
    assert "bad, toy, 4 KB" in report.failure_list(document)


def test_a_peer_without_the_operation_leaves_no_row(tmp_path):
    _, document = sweep(tmp_path, OURS, a_peer("other", lambda case: None), sizes=[4096])
    assert {row["implementation"] for row in document["rows"]} == {"fastreg"}


def test_context_of_a_peer_is_open_only_around_it(tmp_path):
    open_now, seen = [], []

    @contextlib.contextmanager
    def context():
        open_now.append(True)
        yield
        open_now.pop()

    def spy(name):
        return a_peer(name, lambda case: lambda x: (seen.append((name, bool(open_now))), halve(x))[1])

    inside = Peer("gems", lambda: "1", spy("gems").build, context)
    sweep(tmp_path, spy("fastreg"), inside, sizes=[4096])
    assert set(seen) == {("fastreg", False), ("gems", True)}


def test_deadline_keeps_what_was_measured(tmp_path):
    _, document = sweep(tmp_path, OURS, deadline=time.monotonic() - 1)
    assert document["rows"] == []
    assert not document["complete"]


@pytest.mark.parametrize(("ours", "code"), [(halve, 0), (lambda x: x * 3, 1)])
def test_run_fails_when_ours_is_wrong(tmp_path, monkeypatch, ours, code):
    monkeypatch.setattr(command, "cases_of", lambda family, parts: [a_case(ours)])
    monkeypatch.setattr(torch, "set_num_threads", lambda count: None)
    options = ["--device", "cpu", "--sizes", "4KB", "--budget", "1", "--out", str(tmp_path)]
    assert CliRunner().invoke(command.app, ["run", "dropout", *options]).exit_code == code
    (path,) = tmp_path.glob("dropout-fp32-*.json")
    assert json.loads(path.read_text())["complete"]


@pytest.mark.usefixtures("aten")
def test_run_says_how_much_is_left(tmp_path):
    options = ["--device", "cpu", "--out", str(tmp_path), "--sizes", "1KB,4KB", "--peers", "fastreg,torch"]
    options += ["--cases", "dropout", "--budget", "1"]
    lines = CliRunner().invoke(command.app, ["run", "noise", "dropout", *options]).output.splitlines()
    counts = [re.match(r"(\d+) of (\d+), ", line) for line in lines]
    found = [(int(count[1]), int(count[2])) for count in counts if count]
    assert found == [(number, len(found)) for number in range(1, len(found) + 1)]
    assert len(found) >= 4
    assert command.progress_of(1, 5, 30.0) == "1 of 5, about 2 min left"
    assert command.progress_of(4, 5, 40.0) == "4 of 5, 10 s left"


@pytest.mark.parametrize(
    "options",
    [
        ["--sizes", "4TB"],
        ["--peers", "nobody"],
        ["--dtype", "int3"],
        ["--cases", "none"],
        ["nothing"],
        ["--budget", "-1"],
        ["--budget", "0"],
        ["--budget", "nan"],
        ["--budget", "inf"],
        ["--stop-after", "nan"],
        ["--stop-after", "-1"],
    ],
)
def test_run_refuses_what_it_does_not_know(tmp_path, options):
    done = CliRunner().invoke(command.app, ["run", "--device", "cpu", "--out", str(tmp_path), *options])
    assert done.exit_code == 2


@pytest.mark.parametrize("device", ["tpu", "meta", "cuda", "cuda:99"])
@pytest.mark.parametrize("arguments", [["run", "dropout"], ["steps"], ["sanitize"], ["warm"]])
def test_a_device_that_is_not_there_is_refused_in_one_sentence(arguments, device, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = CliRunner().invoke(command.app, [*arguments, "--device", device])
    assert done.exit_code == 2
    assert isinstance(done.exception, SystemExit)
    assert f"'{device}' is not" in " ".join(done.output.split())
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf"])
def test_seconds_above_zero(seconds, tmp_path):
    for arguments in (["steps", "--device", "cpu"], ["check"]):
        done = CliRunner().invoke(
            command.app, [*arguments, "--out", str(tmp_path / "out"), "--seconds", seconds]
        )
        assert done.exit_code == 2
        assert not (tmp_path / "out").exists()


def test_report_says_that_there_is_nothing_to_report(tmp_path):
    for folder in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        done = CliRunner().invoke(command.app, ["report", "--results", str(folder)])
        assert done.exit_code == 1
        assert isinstance(done.exception, SystemExit)
        assert "no results in" in done.output
        assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


# --- whole training steps -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("aten")
@pytest.mark.parametrize("network", steps.SMALL_NETWORKS, ids=lambda network: network.name)
def test_networks_of_the_implementations_are_one_function(network):
    """With the same weights and no dropout: outputs and gradients in training mode."""
    found = []
    for layers in (networks.PLAIN, networks.FUSED):
        torch.manual_seed(0)
        model = network.build(layers).double()
        for module in model.modules():
            if hasattr(module, "p"):
                module.p = 0.0
        x, target = network.batch(torch.device("cpu"))
        y = model(x.double() if x.is_floating_point() else x)
        torch.nn.functional.cross_entropy(y.flatten(0, -2), target.flatten()).backward()
        found.append({name: parameter.grad for name, parameter in model.named_parameters()} | {"y": y})
    assert list(found[0]) == list(found[1])
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


@pytest.mark.usefixtures("aten")
def test_steps_are_timed_and_shown(tmp_path):
    lines = []
    path = steps.run(
        tmp_path, torch.device("cpu"), names=("fastreg", "torch"), budget=1e-3, tell=lines.append
    )
    document = json.loads(path.read_text())
    assert document["complete"]
    assert document["rows"] == lines
    assert [(row["case"], row["implementation"]) for row in lines] == [
        (network.name, name) for network in steps.SMALL_NETWORKS for name in ("fastreg", "torch")
    ]
    assert all(row["error"] is None and row["median_us"] > 0 for row in lines)
    document["provenance"]["interpreted"] = False  # the variable is set, though ATen ran
    path.write_text(json.dumps(document))
    page = tmp_path / "RESULTS.md"
    assert report.report(tmp_path, page) == [page]
    assert "Tiny networks on a CPU" in page.read_text()
    assert page.read_text().count("| small GPT |") == 2


@pytest.mark.usefixtures("aten")
def test_a_network_with_other_logits_is_not_timed(tmp_path):
    other = steps.Implementation("other", dataclasses.replace(networks.PLAIN, norm=Halved))
    clock = harness.Cpu()
    plain = steps.Implementation("torch", networks.PLAIN)
    rows = list(steps.measure(steps.SMALL_NETWORKS[0], (plain, other), clock, torch.device("cpu"), 1e-3, 60))
    assert [row["error"] is None for row in rows] == [True, False]
    assert "the logits differ" in rows[1]["error"]
    assert "median_us" not in rows[1]


class Halved(networks.PlainNorm):
    def forward(self, x, residual=None):
        return super().forward(x, residual) / 2


# --- the GPU path, with a pretended GPU ---------------------------------------------------------------------


@pytest.fixture
def pretended_gpu(gpu, monkeypatch):
    """The control flow on a GPU, and not the hardware: replays take 0.1 ms, and all else what it takes here."""
    calls = {"replay": 0, "capture": 0, "sleep": []}
    replay, begin = torch.cuda.CUDAGraph.replay, torch.cuda.CUDAGraph.capture_begin

    def replayed(graph):
        calls["replay"] += 1
        time.sleep(1e-4)
        replay(graph)

    def begun(graph, *arguments, **options):
        calls["capture"] += 1
        begin(graph, *arguments, **options)

    monkeypatch.setattr(torch.cuda.CUDAGraph, "replay", replayed)
    monkeypatch.setattr(torch.cuda.CUDAGraph, "capture_begin", begun)
    monkeypatch.setattr(torch.cuda, "_sleep", calls["sleep"].append)
    monkeypatch.setattr(harness, "FLUSH", 2**10)
    monkeypatch.setattr(harness, "CEILING", 2**16)
    monkeypatch.setattr(
        gpu, "properties", lambda device=None: SimpleNamespace(**PROPERTIES, major=9, minor=0)
    )
    original = provenance.provenance

    def pretended(device):
        return original(device) | {"driver": "0", "interpreted": False}

    monkeypatch.setattr(harness, "provenance", pretended)
    gc.freeze()  # a collection before every graph: of what the test makes, not of all that the tests before it left
    yield calls
    gc.unfreeze()


PROPERTIES = {
    "name": "NVIDIA H100 80GB HBM3",
    "L2_cache_size": 64,
    "total_memory": 80 * 2**30,
    "multi_processor_count": 132,
}
CUDA = torch.device("cuda", 0)


def test_gpu_path_times_by_three_methods_and_compares_with_copies(tmp_path, pretended_gpu, monkeypatch):
    monkeypatch.setattr(harness, "SMALL", 4096)
    clock = harness.Cuda(CUDA)
    assert clock.flushed.nbytes == 2**10
    _, document = sweep(tmp_path, OURS, TORCH, clock=clock, device=CUDA)
    methods = {(row["bytes"], row["method"]) for row in document["rows"]}
    assert methods == {(4096, "events"), (4096, "wall"), (4096, "graph"), (8192, "events")}
    assert pretended_gpu["capture"] > 0
    for row in document["rows"]:
        assert row["error"] is None
        assert row["peak_memory"] == 400
        assert row["gbps"] == pytest.approx(row["floor_bytes"] / row["median_us"] / 1e3)
        assert row["of_copy"] > 0
        assert row["of_floor"] > 0
    assert {copy["method"] for copy in document["copy"]} == {"events", "wall", "graph"}
    assert max(copy["bytes"] for copy in document["copy"]) == clock.ceiling == 2 * harness.CEILING
    twice = clock.copy(2 * clock.ceiling, "events", 1e-3)  # scaled, not measured
    assert twice["median_us"] == 2 * clock.copy(clock.ceiling, "events", 1e-3)["median_us"]


def test_events_time_the_gpu_and_not_the_host(pretended_gpu, monkeypatch):
    """Before the first event the GPU sleeps, at least as long as the host takes to launch the call."""
    order = []
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: order.append(("sleep", cycles)))
    record = torch.cuda.Event.record

    def record_of(event, *stream):
        if not stream:
            order.append("event")
        record(event, *stream)

    monkeypatch.setattr(torch.cuda.Event, "record", record_of)
    clock = harness.Cuda(CUDA)
    monkeypatch.setattr(clock, "flush", lambda: order.append("flush"))

    def call():
        order.append("call")
        time.sleep(2e-3)

    clock._timed(call, 2, before=clock.flush)
    assert order[:3] == ["call"] * 3  # to see how long it takes
    (_, cycles) = order[4]
    assert 2e-3 < cycles / harness.FASTEST_CLOCK <= harness.LONGEST_SLEEP
    assert order[3:] == 2 * ["flush", ("sleep", cycles), "event", "call", "event"]


def test_the_cache_is_flushed_by_reading(gpu):
    clock = harness.Cuda(CUDA)
    gpu.forget()
    before = clock.flushed._version
    clock.flush()
    assert clock.flushed.nbytes >= 2 * gpu.properties().L2_cache_size
    assert [one.name for one in gpu.operations] == ["sum"]  # and writes one number
    assert clock.flushed._version == before
    assert gpu.waits == []


def test_gpu_results_render(tmp_path, pretended_gpu):
    sweep(tmp_path / "results" / "h100", OURS, TORCH, clock=harness.Cuda(CUDA), device=CUDA)
    readme = tmp_path / "README.md"
    readme.write_text(f"top\n{report.BEGIN}\nold\n{report.END}\nbottom\n")
    written = report.report(tmp_path / "results", tmp_path / "RESULTS.md", readme)
    assert [path.name for path in written[:3]] == [
        f"toys-fp32-{d}.png" for d in ("forward", "backward", "both")
    ]
    assert all(path.stat().st_size > 1000 for path in written[:3])
    text = readme.read_text()
    assert text.startswith("top\n")
    assert text.endswith("bottom\n")
    assert "old" not in text
    assert "NVIDIA H100 80GB HBM3" in text
    assert "](results/h100/toys-fp32-forward.png)" in text


# --- the report ---------------------------------------------------------------------------------------------


def a_row(implementation, median, case="toy", method="events", nbytes=2**30, error=None):
    timed = error is None
    return {
        "case": case,
        "dtype": "bf16",
        "shape": [2**17, 4096],
        "bytes": nbytes,
        "implementation": implementation,
        "direction": "forward" if timed else None,
        "method": method if timed else None,
        "n": 10,
        "median_us": median,
        "min_us": median,
        "p20_us": median,
        "p80_us": median,
        "floor_bytes": 2 * nbytes,
        "gbps": 1000.0,
        "of_copy": 0.5,
        "of_floor": 0.4,
        "peak_memory": 2**31,
        "error": error,
    }


def a_document(*rows, device="cuda", date="2026-01-02T00:00:00+00:00", quick=False, **origin):
    gpu = device == "cuda"
    return {
        "schema": harness.SCHEMA,
        "family": "toys",
        "dtype": "bf16",
        "quick": quick,
        "complete": True,
        "provenance": {
            "device": device,
            "gpu": "NVIDIA H100 80GB HBM3" if gpu else None,
            "slug": "h100" if gpu else "cpu",
            "cpu": "a processor",
            "driver": "1",
            "cuda": "13.0",
            "torch": "2",
            "triton": "3",
            "fastreg": "0",
            "commit": "abc1234",
            "dirty": False,
            "date": date,
            "interpreted": False,
        }
        | origin,
        "peers": {"fastreg": "0", "torch": "2", "compile": "2", "attorch": "absent: not there"},
        "copy": [{"bytes": 2**31, "method": "events", "gbps": 2500.0}] if gpu else [],
        "rows": list(rows),
    }


def saved(folder, *documents):
    folder.mkdir(parents=True, exist_ok=True)
    for number, document in enumerate(documents):
        (folder / f"{number}.json").write_text(json.dumps(document))
    return report.load(folder)


def page_of(tmp_path, *documents):
    return report.results_page(saved(tmp_path / "results", *documents), tmp_path / "RESULTS.md")


def test_losses_come_first_in_red(tmp_path):
    page = page_of(
        tmp_path,
        a_document(
            a_row("fastreg", 100, "win"),
            a_row("torch", 200, "win"),
            a_row("fastreg", 100, "loss"),
            a_row("torch", 150, "loss"),
            a_row("compile", 80, "loss"),
            a_row("fastreg", 100, "tie"),
            a_row("torch", 99.9, "tie"),
        ),
    )
    table = [line for line in page.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in table[2:]] == ["| loss", "| win", "| tie"]
    assert "🔴 **0.80×** (80.0)" in table[2]
    assert "1.50× (150.0)" in table[2]
    assert "🔴" not in "".join(table[3:])
    assert "859.0" in table[2]  # the floor: 2³¹ bytes at 2500 GB/s, in µs
    assert "Peers not installed: attorch." in page


def test_failures_are_listed_ours_first(tmp_path):
    rows = [
        a_row("torch", 1),
        a_row("compile", None, error="TimeoutError: slow"),
        a_row("fastreg", None, error="wrong: x"),
    ]
    page = page_of(tmp_path, a_document(*rows))
    assert page.index("🔴 fastreg, toy, 1 GB: `wrong: x`") < page.index(
        "compile, toy, 1 GB: `TimeoutError: slow`"
    )
    assert "🔴 **not timed**" in page


def test_a_labelled_sweep_stands_beside_the_others(tmp_path):
    page = page_of(
        tmp_path, a_document(a_row("fastreg", 1)), a_document(a_row("fastreg", 2)) | {"label": "compiled"}
    )
    assert "## toys, bf16, NVIDIA H100" in page
    assert "## toys, bf16, compiled, NVIDIA H100" in page


def test_newest_full_sweep_counts(tmp_path):
    documents = saved(
        tmp_path,
        a_document(a_row("fastreg", 1), date="2026-01-01"),
        a_document(a_row("fastreg", 2), date="2026-01-03"),
        a_document(a_row("fastreg", 3), date="2026-01-02"),
        a_document(a_row("fastreg", 4), date="2026-01-09", quick=True),
        a_document(a_row("fastreg", 5), date="2026-01-09", interpreted=True),
        {"reports": []},
    )
    assert [document["rows"][0]["median_us"] for document in documents] == [2]


def test_what_calls_take_on_the_host_is_measured_and_shown(tmp_path):
    path = tmp_path / "host.json"
    done = CliRunner().invoke(
        command.app, ["host", "--out", str(path), "--cases", "dropout", "--rounds", "1"]
    )
    assert done.exit_code == 0, done.output
    content = json.loads(path.read_text())
    assert content["provenance"]["torch"] == torch.__version__
    assert not content["provenance"]["interpreted"]
    rows = {(row["case"], row["part"]): row for row in content["rows"]}
    assert {case for case, _ in rows} == {
        host.TRIVIAL,
        "torch dropout, CPU, 16 elements",
        "dropout, CPU, 16 elements",
        "dropout",
        "dropout, gelu, residual",
    }
    assert all(row["us"] > 0 for row in rows.values())
    on_gpu = torch.cuda.is_available()
    for part in (host.FORWARD, host.TRAINED, host.BACKWARD):
        assert rows["dropout", part]["launches"] == (None if on_gpu else 1)
        assert rows["dropout, CPU, 16 elements", part]["launches"] == (None if on_gpu else 0)
    page = tmp_path / "RESULTS.md"
    report.report(tmp_path, page)
    cells = [report.host_cell(rows["dropout", part]) for part in host.PARTS[0]]
    assert f"| dropout | {'' if on_gpu else '1, 1, 1'} | {' | '.join(cells)} |" in page.read_text()


class Clock:
    """Time that passes only where it is said."""

    def __init__(self, monkeypatch):
        self.now = 0
        monkeypatch.setattr(host.time, "process_time_ns", lambda: self.now)

    def passes(self, *nanoseconds: int):
        """A call that takes these times in turn."""
        times = itertools.cycle(nanoseconds)

        def call():
            self.now += next(times)

        return call


def measured(*found: host.Case, launches=lambda: None) -> dict:
    rows = host.measure(found, launches, lambda: None, rounds=2)
    return {(row["case"], row["part"]): row for row in rows}


def a_host_case(name: str, run, part: str = host.FORWARD, before=None, **more) -> host.Case:
    return host.Case(name, lambda: [host.Call(part, run, before)], **more)


def test_host_times_are_the_least_and_ratios_to_the_yardstick(monkeypatch):
    clock = Clock(monkeypatch)
    rows = measured(
        a_host_case(host.TRIVIAL, clock.passes(10_000)),
        a_host_case("noisy", clock.passes(*[1_000_000] * 50, *[30_000] * 30), goal=3),
        a_host_case("twice", clock.passes(70_000), host.BACKWARD, goal=3),
        a_host_case("theirs", clock.passes(80_000), host.SAME, yardstick="theirs"),
        a_host_case("ours", clock.passes(20_000), host.SAME, yardstick="theirs", goal=1),
    )
    assert [row["us"] for row in rows.values()] == pytest.approx([10, 30, 70, 80, 20])
    assert [row["ratio"] for row in rows.values()] == pytest.approx([1, 3, 7, 1, 0.25])
    assert [row["goal"] for row in rows.values()] == [None, 3, 6, None, 1]
    assert rows["twice", host.BACKWARD]["yardstick"] == (host.TRIVIAL, host.FORWARD)
    assert rows["ours", host.SAME]["yardstick"] == ("theirs", host.SAME)


def test_host_times_leave_out_what_comes_before_a_call(monkeypatch):
    clock = Clock(monkeypatch)
    trivial = a_host_case(host.TRIVIAL, clock.passes(10_000))
    new = a_host_case("new", clock.passes(20_000), before=clock.passes(900_000))
    assert measured(trivial, new)["new", host.FORWARD]["us"] == pytest.approx(20)


def test_host_launches_are_those_of_one_call():
    done: list[int] = []
    three = a_host_case("three", lambda: done.extend([1, 1, 1]))
    rows = measured(a_host_case(host.TRIVIAL, lambda: None), three, launches=lambda: len(done))
    assert [row["launches"] for row in rows.values()] == [0, 3]


def test_host_table_says_which_goals_are_met():
    def row(case, part, us, ratio, goal=None, launches=0):
        return {"case": case, "part": part, "us": us, "ratio": ratio, "goal": goal, "launches": launches}

    rows = [
        row("x", host.FORWARD, 12.34, 3.0, 3, 1),
        row("x", host.BACKWARD, 30.0, 6.25, 6, 2),
        row("torch", host.FORWARD, 1.0, 0.25),
    ]
    ((header, lines),) = report.host_tables(rows)
    assert header == ["call", "launches", host.FORWARD, host.TRAINED, host.BACKWARD]
    assert lines == [
        ["x", "1, 2", "12.3, 3.00× ≤ 3", "", f"{report.RED} 30.0, 6.25× > 6"],
        ["torch", "", "1.0, 0.25×", "", ""],
    ]
    steps = [row("step", host.SAME, 5.0, 1.0), row("step", host.NEW, 6.0, 1.5)]
    assert report.host_tables(steps) == [
        (["call", "launches", host.SAME, host.NEW], [["step", "", "5.0, 1.00×", "6.0, 1.50×"]])
    ]


def test_host_cases_have_yardsticks_and_the_goals_that_were_set():
    found = host.cases(torch.device("cpu"))
    names = [case.name for case in found]
    assert len(set(names)) == len(names)
    assert {case.yardstick for case in found} <= set(names)
    goals = {case.name: case.goal for case in found if case.goal is not None}
    assert goals == {
        "dropout": 3,
        "dropout, gelu, residual": 3,
        "layer_norm": 5,
        "group_norm": 5,
        "batch_norm": 5,
        "AdamW, 100 tensors of 64": 1,
    }


@pytest.mark.parametrize("name", ["dropout", "layer_norm", "group_norm", "batch_norm"])
def test_host_parts_are_with_and_without_gradients(aten, name):
    (case,) = (case for case in host.without_kernels() if case.name.startswith(name))
    forward, trained, backward = case.calls()
    assert not forward.run().requires_grad
    assert trained.run().requires_grad
    gradients = backward.run()
    assert len(gradients) == (1 if name == "dropout" else 3)
    assert all(isinstance(x, torch.Tensor) for x in gradients)


def test_host_steps_meet_the_same_gradients_and_new_ones():
    def seen(call: host.Call) -> set[int]:
        params, found = call.run.__self__.param_groups[0]["params"], set()
        for _ in range(4):
            if call.before is not None:
                call.before()
            found.add(params[0].grad.data_ptr())
        return found

    same, new = host._steps(torch.optim.AdamW, 3, torch.device("cpu"))
    assert (len(seen(same)), len(seen(new))) == (1, 2)


def test_without_a_compiled_kernel_there_is_nothing_to_launch(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(RuntimeError, match="interprets the kernels"), idle_gpu.attached():
        pass


SMALL = ((5, 7), (6, 3))


def test_what_options_cost_on_the_cpu_is_measured_and_shown(tmp_path, monkeypatch, aten):
    monkeypatch.setattr(pieces, "SHAPES", {"2 small ones": SMALL})
    monkeypatch.setattr(pieces, "REPEATS", 2)
    path = tmp_path / "pieces.json"
    done = CliRunner().invoke(command.app, ["pieces", "--out", str(path)])
    assert done.exit_code == 0, done.output
    rows = json.loads(path.read_text())["rows"]
    assert [row["case"] for row in rows] == list(pieces.CASES)
    assert all(0 < row["ours_ms"] and 0 < row["torch_ms"] for row in rows)
    page = tmp_path / "RESULTS.md"
    report.report(tmp_path, page)
    assert (
        f"| AdamW | 2 small ones | {rows[0]['ours_ms']:.3f} | {rows[0]['torch_ms']:.3f} |" in page.read_text()
    )


@pytest.mark.parametrize("name", pieces.CASES)
def test_both_sides_do_the_same(aten, name):
    """``renorm`` divides by norm + 1e-7; and sums in another order, steps of 1e-2."""
    for ours, theirs in zip(*pieces.results(name, SMALL), strict=True):
        assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_readme_without_gpu_shows_predictions_as_predictions(tmp_path):
    cpu = a_document(
        a_row("fastreg", 106, method="perf_counter"), a_row("torch", 100, method="perf_counter"), device="cpu"
    )
    documents = saved(tmp_path / "results" / "cpu", cpu)
    static = tmp_path / "results" / "static.json"
    prediction = {"gpu": "H100", "bound": "memory", "copy_rate_percent": 100.0, "memory_ps": 2, "issue_ps": 1}
    prediction |= {"headroom": 2.0}
    kernel = {
        "family": "dropout",
        "kernel": "forward bf16",
        "headline": True,
        "registers": 32,
        "spill_instructions": 0,
        "instructions": 14.8,
        "bytes_per_element": 4.0,
        "predictions": [prediction, prediction | {"gpu": "H200"}],
    }
    detail = kernel | {"kernel": "a detail", "headline": False, "registers": 40, "instructions": 20.0}
    static.write_text(json.dumps({"triton": "3.6.0", "source": "abc", "reports": [kernel, detail]}))
    readme, page = tmp_path / "README.md", tmp_path / "RESULTS.md"
    section = report.readme_section(documents, static, readme, page)
    assert section.startswith("No GPU results yet")
    assert "not measurements" in section
    assert "| dropout | 2 | 0 | 40 | 14.8 to 14.8 | memory | 2 |" in section  # one GPU stands for all
    assert "![predictions](results/static.png)" in section
    details = report.results_page(documents, page, static)
    assert "| dropout | forward bf16 | 32 | 0 | 14.8 | 4 | memory | 100 % |" in details
    assert "a detail" in details
    assert "a detail" not in section
    assert "106" not in section  # a CPU timing is no claim

    overhead = report.results_page(documents, page)
    assert "Overhead over torch on a CPU" in overhead
    assert "🔴 **+6 %**" in overhead
    assert "GB/s" not in overhead.split("## toys")[1]


def test_predictions_are_drawn(tmp_path):
    prediction = {"gpu": "H100", "headroom": 2.0}
    kernels = [{"family": "dropout", "kernel": "a", "headline": True, "predictions": [prediction]}]
    report.draw_predictions({"reports": kernels}, tmp_path / "static.png")
    assert (tmp_path / "static.png").read_bytes().startswith(b"\x89PNG")


def test_report_leaves_a_readme_alone_that_it_is_not_given(tmp_path, monkeypatch):
    monkeypatch.setattr(command, "REPOSITORY", tmp_path)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "bench/results")
    (tmp_path / "bench/results").mkdir(parents=True)
    (tmp_path / "bench/results/other.json").write_text("{}")
    readme = tmp_path / "README.md"
    text = f"{report.BEGIN}\nmine\n{report.END}\n"
    readme.write_text(text)
    runner = CliRunner()
    assert runner.invoke(command.app, ["report", "--results", str(tmp_path / "bench/results")]).exit_code == 0
    assert readme.read_text() == text
    assert runner.invoke(command.app, ["report", "--readme", str(readme)]).exit_code == 0
    assert "mine" not in readme.read_text()


def test_readme_needs_its_markers():
    with pytest.raises(ValueError, match="bench:begin"):
        report.replace_section("no markers", "x")


# --- provenance ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H100 PCIe", "h100-pcie"),
        ("NVIDIA H100 NVL", "h100-nvl"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA A100-PCIE-40GB", "a100-pcie-40gb"),
        ("NVIDIA B200", "b200"),
        ("NVIDIA GB200", "gb200"),
        ("NVIDIA L40S", "l40s"),
        ("Tesla T4", "t4"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GeForce RTX 3080 Ti", "rtx-3080-ti"),
        ("NVIDIA RTX A6000", "rtx-a6000"),
        ("AMD Instinct MI300X", "mi300x"),
        ("NVIDIA Something New", "something-new"),
    ],
)
def test_slug(name, slug):
    assert provenance.slug(name) == slug


def test_provenance_names_the_commit():
    head = provenance.output("git", "rev-parse", "--short", "HEAD")
    assert provenance.provenance(torch.device("cpu"))["commit"] == (head or "unknown")


def test_a_copy_without_git_takes_the_commit_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setattr(provenance, "REPOSITORY", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.setenv("FASTREG_COMMIT", "abc1234")
    assert provenance.commit() == ("abc1234", None)


# --- the check ----------------------------------------------------------------------------------------------


def test_a_stage_that_hangs_is_ended_and_its_output_kept(tmp_path):
    stage = Stage("slow", ["sh", "-c", "echo so far; sleep 60"])
    assert run_stage(stage, 1, tmp_path / "slow.log")["status"] == "timeout"
    assert (tmp_path / "slow.log").read_text() == "so far\n"


def test_stages_for_a_gpu(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.which", lambda name: f"/opt/{name}")
    plan = {stage.name: stage for stage in stages(tmp_path, dry=False, tests=None)}
    assert list(plan) == ["tests", "warm", "memcheck", "racecheck", "bench", "compiled", "steps", "report"]
    assert plan["tests"].environment["TRITON_INTERPRET"] is None  # the real kernels, natively
    assert plan["racecheck"].command[:3] == ["/opt/compute-sanitizer", "--tool", "racecheck"]
    assert "--device" not in plan["bench"].command
    monkeypatch.setattr("shutil.which", lambda name: None)
    missing = {stage.name: stage.skip for stage in stages(tmp_path, dry=False, tests=None)}
    assert missing["memcheck"] == "compute-sanitizer not found"


def test_tests_without_time_are_left_out_and_said_to_be(tmp_path):
    """Until then the cases of all functions take turns."""
    (tmp_path / "conftest.py").write_text((ROOT / "tests/conftest.py").read_text())
    (tmp_path / "test_time.py").write_text(
        "import time, pytest\n"
        "@pytest.mark.parametrize('case', range(80))\n"
        "def test_many(case): time.sleep(0.1)\n"
        "def test_one(): pass\n"
    )
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        str(tmp_path),
        "--stop-after",
        "5",
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "tests")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if "::" in line]
    assert "test_many[0] PASSED" in lines[0]
    assert "test_one PASSED" in lines[1]
    assert "test_many[79] SKIPPED (left out: no time)" in lines[-1]


def test_the_stages_fit_into_what_a_machine_is_lent_for(tmp_path):
    """A command on a lent machine has ten minutes; its first process takes some of them."""
    plan = stages(tmp_path, dry=False, tests=None)
    assert {stage.name for stage in plan} == set(check.SHARES)
    assert sum(check.SHARES.values()) == check.TOTAL <= 600 - 45


def test_a_stage_that_stops_by_itself_is_told_when(tmp_path, monkeypatch):
    say = "import sys; print('of', sys.argv[1:])"
    plan = [
        Stage("bench", [sys.executable, "-c", say], stops=True),
        Stage("report", [sys.executable, "-c", say]),
    ]
    monkeypatch.setattr(check, "stages", lambda *arguments: plan)
    (told, report), ok = check.check(tmp_path, dry=True)
    seconds = int(told["command"].rpartition(" ")[2])
    assert 0.5 * check.TOTAL < seconds < 0.8 * check.TOTAL
    assert told["says"] == f"of ['--stop-after', '{seconds}']"
    assert report["says"] == "of []"
    assert ok


def test_the_sanitizers_runs_take_turns_and_what_is_left_out_is_said(monkeypatch):
    seen = []
    monkeypatch.setattr(command, "once", lambda case, *shape: seen.append(case.name))
    done = CliRunner().invoke(command.app, ["sanitize", "--device", "cpu"])
    assert done.exit_code == 0
    families = [len(command.cases_of(name, [])) for name in command.FAMILIES]
    assert len(seen) == 2 * sum(families)
    assert f"checked {len(seen)} of {len(seen)} runs" in done.output
    first = {command.cases_of(name, [])[0].name for name in command.FAMILIES if command.cases_of(name, [])}
    assert set(seen[: len(first)]) == first

    seen.clear()
    ticks = itertools.count()
    monkeypatch.setattr(command.time, "monotonic", lambda: next(ticks))
    done = CliRunner().invoke(command.app, ["sanitize", "--device", "cpu", "--stop-after", "3"])
    assert len(seen) == 3
    assert f"checked 3 of {2 * sum(families)} runs; left out: " in done.output


def test_a_wrong_case_fails_under_the_sanitizer(monkeypatch):
    monkeypatch.setattr(command, "cases_of", lambda family, parts: [a_case(lambda x: x * 3)])
    done = CliRunner().invoke(command.app, ["sanitize", "dropout", "--device", "cpu"])
    assert done.exit_code == 1
    assert "wrong: " in done.output


def test_what_is_warmed_up_is_all_that_follows(monkeypatch):
    """Each case in every shape that is timed or sanitized, each network once; every job in one of the processes."""
    launched, steps_taken = [], []
    monkeypatch.setattr(
        command, "prepare", lambda direction, function, inputs: lambda: launched.append(inputs)
    )
    monkeypatch.setattr(command, "Step", lambda network, *rest: lambda: steps_taken.append(network.name))
    monkeypatch.setattr(command, "in_turns", lambda names: [a_case()] * 3)
    for part in range(4):
        options = ["--part", str(part), "--processes", "4", "--device", "cpu"]
        assert CliRunner().invoke(command.app, ["warm", *options]).exit_code == 0
    assert len(launched) == 3 * (2 + 1)
    assert sorted(steps_taken) == sorted(network.name for network in steps.SMALL_NETWORKS)


@pytest.mark.slow  # a minute; CI runs it apart
@pytest.mark.skipif("FASTREG_CHECK" in os.environ, reason="runs within the check itself")
def test_check_makes_a_dry_run_end_to_end(tmp_path):
    command = [sys.executable, "-m", "bench", "check", "--dry-run", "--out", str(tmp_path)]
    command += ["--tests", "tests/test_bench.py -k test_slug"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=590
    )  # two minutes on a quiet machine
    logs = "\n".join(log.read_text()[-2000:] for log in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    assert "DRY RUN" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["dry_run"]
    assert summary["ok"]
    statuses = {stage["stage"]: stage["status"] for stage in summary["stages"]}
    assert statuses == {
        "tests": "ok",
        "warm": "ok",
        "memcheck": "ok",
        "racecheck": "skipped",
        "bench": "ok",
        "compiled": "skipped",
        "steps": "ok",
        "report": "ok",
    }
    (result,) = (tmp_path / "results").glob("dropout-fp32-quick-*.json")
    rows = json.loads(result.read_text())["rows"]
    assert [row["error"] for row in rows if row["error"]] == []
    assert "Overhead over torch on a CPU" in (tmp_path / "RESULTS.md").read_text()
    assert (tmp_path / "results" / "dropout-fp32-both.png").exists()


def test_check_fails_when_a_stage_fails_and_runs_the_others(tmp_path, monkeypatch):
    plan = [
        Stage("tests", [sys.executable, "-c", "exit(3)"]),
        Stage("report", [sys.executable, "-c", "pass"]),
    ]
    monkeypatch.setattr(check, "stages", lambda *arguments: plan)
    results, ok = check.check(tmp_path, dry=True)
    assert not ok
    assert [(result["status"], result["code"]) for result in results] == [("failed", 3), ("ok", 0)]
    assert json.loads((tmp_path / "summary.json").read_text())["stages"] == results


def test_tests_on_executed_ptx_have_a_table(tmp_path):
    run = {
        "options": "",
        "tests": 3,
        "failed": [],
        "launches": 70,
        "variants": ["noise.add_noise:1", "x.y:2"],
    }
    files = {"a.py": run, "b.py": run | {"failed": ["b.py::c"], "variants": ["x.y:2", "x.y:3"]}}
    (tmp_path / "machine_tests.json").write_text(json.dumps({"sm_90, 3.9.0": files}))
    report.report(tmp_path, tmp_path / "page.md")
    assert "| sm_90, 3.9.0 | 2 | 6 | 1 | 2 | 3 | 140 |" in (tmp_path / "page.md").read_text()


def test_models_are_compared_and_counted(tmp_path, monkeypatch):
    """One small model through all of it, and onto the page."""
    from fastreg.bench import conversion

    def make():
        return nn.Sequential(
            nn.Conv2d(3, 4, 3),
            nn.BatchNorm2d(4),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(16, 8),
            nn.GELU(),
            nn.Dropout(0.5),
        )

    case = conversion.Case("torch", "small", make, lambda: torch.randn(2, 3, 4, 4))
    broken = conversion.Case("torch", "broken", lambda: 1 / 0, lambda: None)
    absent = conversion.Case("no_such_library", "any", make, lambda: None)
    monkeypatch.setattr(conversion, "CASES", [case, broken, absent])
    monkeypatch.setattr(conversion, "COUNTED", [case])
    path = tmp_path / "conversion.json"
    done = CliRunner().invoke(command.app, ["models", "--out", str(path), "--repeats", "1"])
    assert done.exit_code == 0, done.output
    content = json.loads(path.read_text())
    row, failed = content["rows"]
    assert (row["layers"], row["converted"], row["state_dict"]) == (2, 2, True)
    assert row["seams"] == {"activation -> dropout": [1, 1], "norm -> activation": [1, 1]}
    assert {form: d for form, d in row["differences"].items() if max(d.values()) > 1e-6} == {}
    assert "division by zero" in failed["error"]
    (counted,) = content["counts"]
    assert counted["fused"]["launches"] < counted["classes"]["launches"]
    assert counted["fused"]["bytes"] < counted["classes"]["bytes"]
    page = tmp_path / "RESULTS.md"
    report.report(tmp_path, page)
    assert "## Converted models" in page.read_text()
    assert "| torch | small | 2 / 2 | 2 / 2 |" in page.read_text()
