"""Times cases: every implementation checked, then timed forward, backward and both, beside the copy rate.

On a GPU three methods, each named in its rows:

- ``events``: CUDA events around each call, other data in the L2 cache. What the kernels take, with their data in
  memory. Before the first event the GPU sleeps for as long as the host needs to launch, so that it never waits.
- ``wall`` (small inputs): host time of back-to-back eager calls. What a training step pays, with launches.
- ``graph`` (small inputs): replay of a CUDA graph of many calls, the data warm in L2. What the kernels take
  without their launches.

On a CPU one, ``perf_counter``, good for the overhead over torch and for nothing else: no floors, no rates.
"""

import contextlib
import gc
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch

from .cases import DIRECTIONS, Case
from .peers import Peer
from .provenance import gpu_state, provenance

SCHEMA = 1
SMALL = 16 * 2**20  # up to this many input bytes launches matter: time them eagerly and from a graph too
CEILING = 2**30  # bytes of the large copy that defines the copy rate
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "fp64": torch.float64}
FLUSH = 2**28  # bytes read between repetitions, at least; twice the L2 cache where that is more
FASTEST_CLOCK = 2e9  # cycles a second of a multiprocessor, at most: what a sleep is counted in
LONGEST_SLEEP = 0.02  # seconds: who waits for the GPU in a call is not helped by it
MINIMUM, MAXIMUM = 5, 1000  # repetitions

SIZES = (*(2**k for k in range(12, 31, 2)), 2**31)  # 4 KB, ×4, to 1 GB, and 2 GB
QUICK_SIZES = (2**16, 2**24, 2**30)
CPU_SIZES = tuple(size for size in SIZES if size <= SMALL)
CPU_QUICK_SIZES = (2**12, 2**16, 2**20)


def summary(seconds: Iterable[float]) -> dict:
    """Number of samples and their order statistics, in microseconds."""
    samples = np.asarray(list(seconds)) * 1e6
    p20, median, p80 = np.quantile(samples, (0.2, 0.5, 0.8))
    return {
        "n": len(samples),
        "median_us": float(median),
        "min_us": float(samples.min()),
        "p20_us": float(p20),
        "p80_us": float(p80),
    }


def interleaved(
    a: Callable, b: Callable, pairs: int = 300, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Time of ``a`` over time of ``b``, measured in turns: the ratio of their 20th percentiles.

    Both see the same slow and fast moments of the machine, and the order within a pair alternates, so what is
    left in the ratio is the difference between the two. Other processes only ever add: the quiet fifth of the
    samples says what the functions themselves take.
    """
    taken = {a: [], b: []}
    for turn in range(-20, pairs):  # the negative ones warm up
        for function in (a, b) if turn % 2 else (b, a):
            start = clock()
            function()
            if turn >= 0:
                taken[function].append(clock() - start)
    return float(np.quantile(taken[a], 0.2) / np.quantile(taken[b], 0.2))


def repetitions(budget: float, each: float) -> int:
    return min(MAXIMUM, max(MINIMUM, round(budget / max(each, 1e-9))))


class Cpu:
    """Host clock around each call."""

    rounds = 10  # turns in which the implementations are timed

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock

    def methods(self, nbytes: int) -> dict[str, Callable]:
        return {"perf_counter": self.perf_counter}

    def perf_counter(self, make: Callable[[], Callable], budget: float) -> list[float]:
        call, clock, samples = make(), self.clock, []
        call()
        warm = clock() + budget / 4
        while clock() < warm:
            call()
        end = clock() + budget
        while len(samples) < MINIMUM or (clock() < end and len(samples) < MAXIMUM):
            start = clock()
            call()
            samples.append(clock() - start)
        return samples

    def peak_memory(self, call: Callable) -> None:
        call()

    def copy(self, nbytes: int, method: str, budget: float) -> None:
        return None


class Cuda:
    """CUDA events, the host clock and CUDA graphs. A method takes ``make``, which prepares the call to time:
    a prepared backward must live on the stream that is captured."""

    rounds = 2
    BATCH = 20  # calls in a graph, and eager calls between two synchronizations

    def __init__(self, device: torch.device):
        properties = torch.cuda.get_device_properties(device)
        size = max(2 * properties.L2_cache_size, FLUSH)
        self.flushed = torch.ones(size // 4, dtype=torch.float32, device=device)
        self.sum = torch.zeros((), device=device)
        self.ceiling = 2 * min(CEILING, properties.total_memory // 8)  # bytes that the large copy moves
        self.device = device
        self.copies: dict[tuple[int, str], dict] = {}

    def methods(self, nbytes: int) -> dict[str, Callable]:
        methods = {"events": self.events}
        if nbytes <= SMALL:
            methods |= {"wall": self.wall, "graph": self.graph}
        return methods

    def flush(self) -> None:
        """Fills the L2 cache with other data. They are read: what is written would have to leave it during the call."""
        torch.sum(self.flushed, dim=0, out=self.sum)

    def _launching(self, call: Callable) -> float:
        """Twice the seconds that the host takes to launch a call: how long the GPU has to sleep before it."""
        taken = []
        for _ in range(3):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            taken.append(time.perf_counter() - start)
        return min(2 * max(taken), LONGEST_SLEEP)

    def _timed(self, call: Callable, n: int, before: Callable = lambda: None) -> list[float]:
        """Device time in seconds of each of ``n`` calls; ``before`` runs untimed ahead of each."""
        pairs = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in range(n)]
        cycles = int(FASTEST_CLOCK * self._launching(call))
        for start, end in pairs:
            before()
            torch.cuda._sleep(cycles)
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def _warm(self, call: Callable, budget: float) -> float:
        """Runs for a quarter of the budget, and returns the seconds that one call takes."""
        call()  # compilation and module load
        each = float(np.median(self._timed(call, MINIMUM)))
        self._timed(call, repetitions(budget / 4, each))
        return each

    def events(self, make: Callable[[], Callable], budget: float) -> list[float]:
        call = make()

        def cold():
            self.flush()
            call()

        return self._timed(call, repetitions(budget, self._warm(cold, budget)), before=self.flush)

    def wall(self, make: Callable[[], Callable], budget: float) -> list[float]:
        call = make()
        self._warm(call, budget)
        samples, end = [], time.perf_counter() + budget
        while len(samples) < MINIMUM or time.perf_counter() < end:
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(self.BATCH):
                call()
            torch.cuda.synchronize()
            samples.append((time.perf_counter() - start) / self.BATCH)
        return samples

    def graph(self, make: Callable[[], Callable], budget: float) -> list[float]:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(stream):
            call = make()
            self._warm(call, budget)
            # A collection that unloads a Triton module would break the capture.
            gc.collect()
            gc.disable()
            try:
                with torch.cuda.graph(graph, stream=stream):
                    for _ in range(self.BATCH):
                        call()
            finally:
                gc.enable()
            n = repetitions(budget, self._warm(graph.replay, budget))
            return [sample / self.BATCH for sample in self._timed(graph.replay, n)]

    def peak_memory(self, call: Callable) -> int:
        """Bytes that a call needs beyond what is allocated when it starts."""
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(self.device) - before

    def copy(self, nbytes: int, method: str, budget: float) -> dict:
        """Time of a device copy that moves ``nbytes`` (half read, half written), by the same method. Copies
        beyond the large one run at its rate."""
        measured = min(nbytes, self.ceiling)
        if (measured, method) not in self.copies:
            source = torch.randint(256, (max(1, measured // 2),), dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            row = summary(getattr(self, method)(lambda: lambda: target.copy_(source), budget))
            row |= {"bytes": measured, "method": method, "gbps": measured / row["median_us"] / 1e3}
            self.copies[measured, method] = row
        copy = self.copies[measured, method]
        return copy | {"median_us": copy["median_us"] * nbytes / measured}


def differentiated(inputs: tuple[torch.Tensor, ...]) -> list[torch.Tensor]:
    return [t for t in inputs if t.requires_grad]


def prepare(direction: str, function: Callable, inputs: tuple[torch.Tensor, ...]) -> Callable[[], object]:
    """The call to time, with a random upstream gradient. Backward alone runs again and again on one graph,
    made here, outside of the timing."""
    # Leaves of their own: autograd ties a leaf to the stream it is first used on, which may be captured.
    inputs = tuple(t.detach().requires_grad_(t.requires_grad) for t in inputs)
    wanted = differentiated(inputs)
    if direction == "forward" or not wanted:
        return lambda: function(*inputs)
    y = function(*inputs)
    dy = torch.randn_like(y)
    if direction == "backward":
        return partial(torch.autograd.grad, y, wanted, dy, retain_graph=True)
    return lambda: torch.autograd.grad(function(*inputs), wanted, dy)


@contextlib.contextmanager
def time_limit(seconds: float):
    """Raises TimeoutError in the block after ``seconds`` (a compiler may hang), where there are signals."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_):
        raise TimeoutError(f"took more than {seconds:.0f} s")

    handler = signal.signal(signal.SIGALRM, stop)
    outer, _ = signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))
    started = time.monotonic()
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if outer:  # someone else's alarm (a test runner's) goes on where it was
            signal.setitimer(signal.ITIMER_REAL, max(outer - (time.monotonic() - started), 1e-3))


def explain(error: BaseException) -> str:
    """One line for a result file."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:500]


FIELDS = (
    *("direction", "method", "n", "median_us", "min_us", "p20_us", "p80_us"),
    *("floor_bytes", "gbps", "of_copy", "of_floor", "peak_memory", "backend", "error"),
)


def measure(
    case: Case, peers: Sequence[Peer], inputs: tuple, clock, budget: float, limit: float
) -> list[dict]:
    """The rows of one case at one size. Every implementation is checked first; a wrong or failing one is
    reported and not timed. The others are timed in turns, so that a slow moment of the machine does not fall
    on one alone.
    """
    x = inputs[0]
    nbytes = x.numel() * x.element_size()
    blank = {
        "case": case.name,
        "dtype": next(name for name, dtype in DTYPES.items() if dtype == x.dtype),
        "shape": list(x.shape),
        "bytes": nbytes,
        "implementation": None,
    } | dict.fromkeys(FIELDS)
    rows, ready = [], []

    for peer in peers:
        row = blank | {"implementation": peer.name}
        try:
            with time_limit(limit), peer.context():
                if peer.name == "torch" and case.eager_backend is not None:
                    row["backend"] = case.eager_backend(*inputs)
                function = peer.build(case)
                if function is None:
                    continue
                problem = wrong(case, function, inputs)
                row["peak_memory"] = clock.peak_memory(prepare("both", function, inputs))
        except Exception as error:
            problem = explain(error)
        if problem:
            rows.append(row | {"error": problem})
            if x.is_cuda:  # it may have run out of memory
                torch.cuda.empty_cache()
        else:
            ready.append((peer, function, row))

    directions = DIRECTIONS if differentiated(inputs) else ("forward",)
    directions = [direction for direction in directions if case.floor(direction, x)]  # 0: nothing to do
    for direction, (method, timer) in product(directions, clock.methods(nbytes).items()):
        samples = {peer.name: [] for peer, _, _ in ready}
        errors = {}
        for _ in range(clock.rounds):
            for peer, function, _ in ready:
                if peer.name in errors:
                    continue
                try:
                    with time_limit(limit), peer.context():
                        make = partial(prepare, direction, function, inputs)
                        samples[peer.name] += timer(make, budget / clock.rounds)
                except Exception as error:  # e.g. one that cannot be captured: its other methods stand
                    errors[peer.name] = explain(error)
        for peer, _, row in ready:
            row = row | {"direction": direction, "method": method, "error": errors.get(peer.name)}
            if row["error"] is None:
                row |= summary(samples[peer.name])
                row |= rates(case.floor(direction, x), row["median_us"], method, clock, budget)
            rows.append(row)
    return rows


def wrong(case: Case, function: Callable, inputs: tuple) -> str | None:
    """What the check of the case says about one forward and backward pass."""
    y = function(*inputs)
    dy = torch.randn_like(y)
    wanted = differentiated(inputs)
    problem = case.check(inputs, y, dy, torch.autograd.grad(y, wanted, dy) if wanted else ())
    return problem and f"wrong: {problem}"


def rates(floor: int, median_us: float, method: str, clock, budget: float) -> dict:
    """Achieved rate over the byte floor, and how it compares with copies measured in this run.

    ``of_copy``: with a copy that moves as many bytes, timed by the same method. ``of_floor``: with the time
    of the floor, which is its bytes over the rate of the large copy.
    """
    copy = clock.copy(floor, method, budget)
    if copy is None:
        return {}
    gbps = floor / median_us / 1e3
    ceiling = clock.copy(clock.ceiling, "events", budget)
    return {
        "floor_bytes": floor,
        "gbps": gbps,
        "of_copy": copy["median_us"] / median_us,
        "of_floor": gbps / ceiling["gbps"],
    }


def run(
    family: str,
    cases: Iterable[Case],
    peers: Sequence[Peer],
    *,
    dtype: str,
    sizes: Iterable[int],
    device: torch.device,
    versions: dict[str, str],
    folder: Path,
    quick: bool = False,
    label: str = "",
    budget: float = 0.1,
    deadline: float = math.inf,
    limit: float = 120,
    clock=None,
    tell: Callable[[list[dict]], None] = lambda rows: None,
) -> Path:
    """Sweeps the cases, largest inputs first, and returns the result file.

    The file is written anew after each case, so nothing measured is ever lost. ``budget`` is the seconds for
    one timing, ``limit`` those for one implementation of a case (it may compile), ``deadline`` the
    ``time.monotonic()`` at which the sweep stops; ``tell`` is called with the rows of each case.
    """
    clock = clock or (Cuda(device) if device.type == "cuda" else Cpu())
    origin = provenance(device)
    document = {
        "schema": SCHEMA,
        "family": family,
        "dtype": dtype,
        "quick": quick,
        "label": label,
        "complete": False,
        "provenance": origin,
        "peers": versions,
        "copy": [],
        "rows": [],
    }
    words = [family, dtype, "quick" if quick else "", label, origin["date"][:10], origin["commit"]]
    path = folder / f"{'-'.join(filter(None, words))}.json"
    path.parent.mkdir(parents=True, exist_ok=True)

    def save() -> None:
        document["copy"] = list(getattr(clock, "copies", {}).values())
        path.write_text(json.dumps(document, indent=1) + "\n")

    save()
    for size in sorted(sizes, reverse=True):
        for case in cases:
            if time.monotonic() > deadline:
                save()
                return path
            try:
                inputs = case.inputs(max(1, size // DTYPES[dtype].itemsize), DTYPES[dtype], device)
            except torch.OutOfMemoryError:
                document.setdefault("skipped", []).append(f"{case.name}, {size} bytes: out of memory")
                continue
            # Peers compile for this shape and never pass the recompile limit, where they fall back to eager.
            torch._dynamo.reset()
            found = measure(case, peers, inputs, clock, budget, limit)
            del inputs
            document["rows"] += found
            save()
            tell(found)
    document["complete"] = True
    if device.type == "cuda":
        origin["after"] = gpu_state()
    save()
    return path
