"""Where trials run: each in a process of its own, here or on the nodes of a Ray cluster.

A process may be killed at any moment, for the memory it takes for instance: its trial is run again, some
times, and then it is a failed trial. Nothing else is lost with it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Protocol

from graphopt.builds.errors import ConfigError
from graphopt.fleet.trials import Result, Trial, failed, run_trial

Run = Callable[[Trial], Result]
PRELOADED = ("graphopt.builds.building", "graphopt.verify.compare", "graphopt.backends.measure")


class Runner(Protocol):
    """Runs `slots` trials at once; the caller submits no more than that."""

    slots: int

    def submit(self, trial: Trial) -> None: ...

    def finished(self) -> tuple[Trial, Result]:
        """The next trial that has a result; there must be one running."""
        ...

    def close(self) -> None: ...


# -- processes ----------------------------------------------------------------------------------


class Processes:
    """A process for every trial. What it prints goes to KEY.log in the folder `logs`."""

    def __init__(self, slots: int, retries: int, logs: Path, run: Run = run_trial) -> None:
        self.slots, self._retries, self._logs, self._run = slots, retries, logs, run
        self._running: dict[Connection, tuple[Any, Trial, int]] = {}
        if "forkserver" in multiprocessing.get_all_start_methods():
            self._context: Any = multiprocessing.get_context("forkserver")
            # loaded once, by the process that all others are copies of
            self._context.set_forkserver_preload([*PRELOADED, run.__module__])
        else:
            self._context = multiprocessing.get_context("spawn")

    def submit(self, trial: Trial, attempt: int = 1) -> None:
        receiver, sender = self._context.Pipe(duplex=False)
        log = self._logs / f"{trial.key}.log"
        process = self._context.Process(target=_child, args=(self._run, trial, sender, log))
        process.start()
        sender.close()
        self._running[receiver] = process, trial, attempt

    def finished(self) -> tuple[Trial, Result]:
        while True:
            ready = set(wait([one for receiver, (process, *_) in self._running.items()
                              for one in (process.sentinel, receiver)]))  # fmt: skip
            for receiver, (process, trial, attempt) in list(self._running.items()):
                if not ready & {process.sentinel, receiver}:
                    continue
                del self._running[receiver]
                result = _received(process, receiver)
                if isinstance(result, str) and attempt <= self._retries:
                    self.submit(trial, attempt + 1)
                    continue
                if isinstance(result, str):
                    result = failed(trial, f"{result}, {attempt} times; see {trial.key}.log")
                return trial, {**result, "attempts": attempt}

    def close(self) -> None:
        for receiver, (process, *_) in self._running.items():
            process.kill()
            process.join()
            receiver.close()
        self._running.clear()


def _child(run: Run, trial: Trial, sender: Connection, log: Path) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends its processes
    with open(log, "wb", buffering=0) as file:
        sys.stdout.flush()
        sys.stderr.flush()
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sender.send(run(trial))
    sender.close()


def _received(process: Any, receiver: Connection) -> Result | str:
    """What a process sent, or how it died."""
    try:
        result: Result | str = receiver.recv() if receiver.poll() else ""
    except (EOFError, OSError):
        result = ""
    receiver.close()
    process.join()
    code = process.exitcode
    if result:
        return result
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    try:
        return f"its process was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"its process was ended by signal {-code}"


# -- Ray ----------------------------------------------------------------------------------------


class Cluster:
    """A Ray task for every trial; Ray runs it again, on another node if need be, when its process dies."""

    def __init__(
        self, ray: Any, slots: int | None, threads: int, retries: int, run: Run = run_trial
    ) -> None:
        self._ray = ray
        self.slots = slots or max(1, int(ray.cluster_resources().get("CPU", 1)) // threads)
        self._task = ray.remote(num_cpus=threads, max_retries=retries)(run)
        self._retries = retries
        self._running: dict[Any, Trial] = {}

    def submit(self, trial: Trial) -> None:
        self._running[self._task.remote(trial)] = trial

    def finished(self) -> tuple[Trial, Result]:
        (ready, *_), _ = self._ray.wait(list(self._running), num_returns=1)
        trial = self._running.pop(ready)
        try:
            result: Result = self._ray.get(ready)
        except self._ray.exceptions.RayError as error:
            said = str(error).strip().partition("\n")[0]
            reason = f"its process died, {self._retries + 1} times: {type(error).__name__}: {said}"
            return trial, failed(trial, reason)
        return trial, result

    def close(self) -> None:
        for one in self._running:
            self._ray.cancel(one, force=True)
        self._running.clear()


@contextmanager
def connected(address: str, cpus: int | None = None) -> Iterator[Any]:
    """Ray, connected to a cluster; "local" starts one of `cpus` processors that ends with the block. A
    connection that there is already is used, and stays.

    Raises:
        ConfigError: if Ray is not installed, or there is no cluster at the address.
    """
    try:
        import ray
    except ImportError:
        raise ConfigError("--ray needs Ray; pip install 'graphopt[ray]'") from None
    if ray.is_initialized():
        yield ray
        return
    local: Any = {"num_cpus": cpus, "include_dashboard": False} if address == "local" else {}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        raise ConfigError(f"--ray {address}: {str(error).strip().partition(chr(10))[0]}") from error
    try:
        yield ray
    finally:
        ray.shutdown()
