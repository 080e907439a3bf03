"""The report of the benchmark suite: tables, pictures, host times, predictions."""

import itertools
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from typer.testing import CliRunner

from fastreg.bench import __main__ as command
from fastreg.bench import harness, host, idle_gpu, pieces, report

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
