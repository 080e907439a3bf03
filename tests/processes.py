"""Real processes that communicate with gloo, for the tests of what is distributed.

They are started once a test file and size of the world, and then serve jobs: functions of that file, named ``job_...``,
run by all of them at the same time. The fixture ``processes`` of ``conftest.py`` starts and stops them.
"""

import contextlib
import datetime
import importlib
import multiprocessing
import os
import pickle
import traceback
from typing import Any

import machine_option
import torch
import torch.distributed as dist

from fastreg.ops import backend

SECONDS = 60  # a collective, and a job: what takes longer hangs


def serve(rank: int, world: int, store: str, connection) -> None:
    torch.set_num_threads(1)
    if machine_option.TARGET is not None:
        machine_option.attach()
    elif backend.INTERPRETED:
        import interpreter

        interpreter.prepare()
    if backend.INTERPRETED:
        backend.multiprocessors = lambda device: 1  # fewer programs for the interpreter, each with more to do
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # looking up the name of the machine may take seconds
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=world, timeout=timeout
    )
    with contextlib.suppress(EOFError):
        while True:
            module, name, path, arguments = pickle.loads(connection.recv_bytes())
            take(path)
            torch.manual_seed(0)
            try:
                answer = True, getattr(importlib.import_module(module), name)(rank, *arguments)
            except BaseException:
                answer = False, f"rank {rank}: {traceback.format_exc()}"
            connection.send_bytes(pickle.dumps(answer))


RUNS_KERNELS = backend.runs_kernels


def take(path: str) -> None:
    """From now on this process takes this path, whatever the tensors."""
    backend.runs_kernels = RUNS_KERNELS if path == "kernels" else lambda x: False


def path_taken() -> str:
    return "kernels" if backend.runs_kernels is RUNS_KERNELS else "aten"


class Processes:
    def __init__(self, world: int, folder, module: str) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(
            ["torch", "torch._dynamo", "triton", module]
        )  # imported once for all of them
        self.world, self.connections, self.processes = world, [], []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=serve, args=(rank, world, str(folder / "store"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)

    def __call__(self, job, path: str | list[str], *arguments) -> list[Any]:
        """What ``job`` returns in each process."""
        paths = [path] * self.world if isinstance(path, str) else path
        for connection, own in zip(self.connections, paths, strict=True):
            connection.send_bytes(pickle.dumps((job.__module__, job.__name__, own, arguments)))
        answers = []
        for connection in self.connections:
            assert connection.poll(2 * SECONDS), "a process hangs"
            answers.append(pickle.loads(connection.recv_bytes()))
        assert all(good for good, _ in answers), "\n".join(str(text) for good, text in answers if not good)
        return [value for _, value in answers]

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
