"""Runs cells on a Ray cluster, in actors that have one CPU core, or GPUs, of a node each.

All nodes need lit-mult installed and the results folder under the same path, on a shared file system. The actor holds
the lease of its cell, so that an attempt ends with the process that makes it.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import traceback
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any
from urllib.parse import urlsplit

from lit_mult.config import TrainerConfig
from lit_mult.errors import Interrupted, UserError
from lit_mult.study.executor import GRACE_SECONDS, Handler, Worker
from lit_mult.study.job import Evaluated, Job, Message
from lit_mult.study.machine import free_gpu_memory, gpus_per_cell, slots
from lit_mult.study.stack import run_jobs


@dataclass(frozen=True)
class _Ready:
    """The first message of an actor."""

    gpu_memory: int | None
    """Free bytes of its GPU."""


_Message = tuple[str, Message] | _Ready
"""What an actor sends: that it is ready, or a message with its cell."""


def connect(workers: int | None, cells: int, trainer: TrainerConfig, address: str | None) -> RayExecutor:
    """Connect to the cluster at `address`, or to a new one on this machine, unless this process is connected.

    Raises:
        UserError: ray is not installed, there is no such cluster, or a cell asks for more GPUs than a node has.
    """
    return RayExecutor(workers, cells, trainer, address)


class RayExecutor:
    """An actor per worker, replaced when it or its node dies. An actor that Ray has not placed yet is not free.

    Each actor has one pending call of `receive`, which returns its next message and fails when the actor dies; the
    driver waits for these calls only.
    """

    def __init__(self, workers: int | None, cells: int, trainer: TrainerConfig, address: str | None) -> None:
        self._ray = _import_ray(address)
        self._workers: dict[Any, _Worker] = {}  # by the reference to the next message
        self._gpu_memory: list[int | None] = []
        self._connected_here = not self._ray.is_initialized()
        if self._connected_here:
            _connect(self._ray, address, 0 if address else len(slots(workers, cells, trainer)))
        try:
            gpus, room = self._room(trainer)
        except UserError:
            self.close()
            raise
        # One thread for `run`, one for `receive`, and one for the other methods.
        self._on_gpus = gpus > 0
        self._actor = self._ray.remote(num_cpus=1, num_gpus=gpus, max_concurrency=3)(_Cells)
        for _ in range(max(1, min(workers or room, cells))):
            self._start()

    @property
    def workers(self) -> int:
        return len(self._workers)

    @property
    def free(self) -> int:
        return sum(worker.is_free for worker in self._workers.values())

    def gpu_memory(self) -> int | None:
        """Reported by the actors that have started: the driver may have no GPU."""
        known = [memory for memory in self._gpu_memory if memory is not None]
        return min(known) if len(known) == len(self._gpu_memory) > 0 else None

    def submit(self, jobs: Sequence[Job]) -> None:
        worker = next(worker for worker in self._workers.values() if worker.is_free)
        worker.cells = [job.id for job in jobs]
        worker.run = worker.actor.run.remote(jobs)

    def poll(self, timeout: float, handle: Handler) -> None:
        ready, _ = self._ray.wait(list(self._workers), timeout=timeout)
        for reference in ready:
            worker = self._workers.pop(reference)
            worker.deliver(self._receive(worker, reference), handle)

    def close(self) -> None:
        runs = [worker.run for worker in self._workers.values() if worker.cells]
        for worker in self._workers.values():
            if worker.cells:
                worker.actor.stop.remote()
        if runs:
            self._ray.wait(runs, num_returns=len(runs), timeout=GRACE_SECONDS)
        for worker in self._workers.values():
            self._ray.kill(worker.actor)
        if self._connected_here:
            self._ray.shutdown()

    def _room(self, trainer: TrainerConfig) -> tuple[int, int]:
        """GPUs per cell, and number of cells that the cluster can run at once."""
        nodes = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
        gpus = [int(node.get("GPU", 0)) for node in nodes]
        if not any(gpus) or trainer.accelerator not in ("auto", "gpu", "cuda"):
            return 0, sum(int(node.get("CPU", 0)) for node in nodes)
        size = gpus_per_cell(trainer.devices, max(gpus))
        if size > max(gpus):
            raise UserError(f"trainer.devices = {trainer.devices}: no node of the cluster has over {max(gpus)} GPUs")
        return size, sum(count // size for count in gpus)

    def _start(self) -> None:
        actor = self._actor.remote(str(Path.cwd()), self._on_gpus)
        self._workers[actor.receive.remote()] = _Worker(actor)

    def _receive(self, worker: _Worker, reference: Any) -> list[tuple[str, Message]]:
        """The message with its cell; when the actor has died, one message per running cell."""
        try:
            received: _Message = self._ray.get(reference)
        except self._ray.exceptions.RayError as error:
            died = isinstance(error, self._ray.exceptions.RayActorError) and not error.actor_init_failed
            if not (worker.ready or died):
                raise UserError(f"--executor ray: a worker cannot be started ({_last_line(error)})") from None
            self._ray.kill(worker.actor)  # it may only be unreachable
            self._start()
            return worker.deaths(f"its worker on the cluster died, or its node was lost ({type(error).__name__})")
        self._workers[worker.actor.receive.remote()] = worker
        if isinstance(received, _Ready):
            worker.ready = True
            self._gpu_memory.append(received.gpu_memory)
            return []
        worker.note(*received)
        return [received]


class _Worker(Worker):
    def __init__(self, actor: Any) -> None:
        super().__init__()
        self.actor = actor
        self.ready = False
        """Has sent its first message."""
        self.run: Any = None
        """Reference that becomes ready when the running cells have ended."""

    @property
    def is_free(self) -> bool:
        return self.ready and not self.cells

    def answer(self, prune: bool) -> None:
        self.actor.answer.remote(prune)


class _Cells:
    """The actor: runs one stack after the other.

    Its methods run in threads. So a signal cannot stop a run here: Ray has its own handler, and Python delivers signals
    to the main thread only.
    """

    def __init__(self, folder: str, on_gpus: bool) -> None:
        import torch

        import lit_mult.training.run  # noqa: F401 - slow, and fails here if a package is missing

        torch.set_num_threads(1)  # in all threads
        self._messages: SimpleQueue[_Message] = SimpleQueue()
        self._answers: SimpleQueue[bool] = SimpleQueue()
        self._stopping = threading.Event()
        with suppress(OSError):  # relative paths in a config start at the sweep's working directory
            os.chdir(folder)
        self._messages.put(_Ready(free_gpu_memory() if on_gpus else None))

    def run(self, jobs: Sequence[Job]) -> None:
        try:
            run_jobs(jobs, self._post, self._stopping.is_set)
        except Interrupted:  # the driver has stopped listening
            pass
        except BaseException:  # would only end this thread, and the driver would wait forever
            traceback.print_exc()  # goes to Ray's logs
            os._exit(1)

    def receive(self) -> _Message:
        return self._messages.get()

    def answer(self, prune: bool) -> None:
        self._answers.put(prune)

    def stop(self) -> None:
        self._stopping.set()
        self._answers.put(False)  # the driver no longer answers

    def _post(self, cell: str, message: Message) -> bool:
        self._messages.put((cell, message))
        return isinstance(message, Evaluated) and self._answers.get()


def _import_ray(address: str | None) -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if not address:  # despite its name this binds Ray to 127.0.0.1 on Linux too: a cluster runs any code it receives
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        import ray
    except ImportError:
        raise UserError("--executor ray: ray is not installed; pip install 'lit-mult[ray]'") from None
    return ray


def _connect(ray: Any, address: str | None, cpus: int) -> None:
    options: dict[str, Any] = {"address": address}
    if not address:  # None would connect to a cluster that the environment names
        options = {"address": "local", "num_cpus": cpus, "include_dashboard": False}
    previous = signal.getsignal(signal.SIGTERM)
    try:
        if address:
            _reach(address)
        ray.init(**options, log_to_driver=False, logging_level="CRITICAL")
    except Exception as error:
        what = f"--address {address}: cannot connect to" if address else "--executor ray: cannot start"
        raise UserError(f"{what} a Ray cluster ({_last_line(error)})") from None
    finally:
        if threading.current_thread() is threading.main_thread():  # Ray has replaced the handler
            signal.signal(signal.SIGTERM, previous)


def _reach(address: str) -> None:
    """Fail fast at a closed port: Ray would retry for 15 minutes."""
    url = urlsplit(address if "://" in address else f"//{address}")
    if url.hostname and url.port:
        socket.create_connection((url.hostname, url.port), timeout=10).close()


def _last_line(error: Exception) -> str:
    """The message of an error, before which Ray puts a traceback."""
    return str(error).strip().rpartition("\n")[2] or type(error).__name__
