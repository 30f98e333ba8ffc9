"""Files of a checkpoint written by the nodes of a Ray cluster.

Every worker maps the same files, makes the same graph of the same model and runs the same passes: the result
is decided by them alone. It does not check sites, but takes what the checks said from the process that made
them. Then it evaluates, shard by shard, what it is told to; a worker that dies is replaced by Ray.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from graphopt.fleet.mapped import CheckpointError, Files, bounded
from graphopt.fleet.shards import Shard, write_shard
from graphopt.torchvision_ops import declare_missing_ops

if TYPE_CHECKING:
    from graphopt.fleet.checkpoint import Task

RETRIES = 3


class Recorded:
    """A validator, and what its checks said, in order."""

    def __init__(self, inner: Any) -> None:
        self._inner, self.verdicts = inner, list[Any]()

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not name.startswith("check"):
            return found

        def check(*args: Any) -> Any:
            self.verdicts.append(found(*args))
            return self.verdicts[-1]

        return check


class Replayed:
    """A validator that says what another one said, of the same sites in the same order."""

    def __init__(self, verdicts: Sequence[Any], inputs: Sequence[Any]) -> None:
        self._verdicts, self.inputs = iter(verdicts), inputs

    def __getattr__(self, name: str) -> Any:
        if name.startswith("check"):
            return lambda *_: next(self._verdicts)
        if name in ("forget", "restart"):
            return lambda *_: None
        raise AttributeError(name)


class Spread:
    """A task that workers do again. It is made before the model takes over the tensors of the files."""

    def __init__(self, ray: Any, task: Task) -> None:
        self._ray = ray
        self._task = ray.cloudpickle.dumps(task)

    def write(
        self, shards: Sequence[Shard], folder: Path, verdicts: list[Any] | None, told: str,
        say: Callable[[str], None],
    ) -> None:  # fmt: skip
        """Write all files.

        Raises:
            CheckpointError: if a worker makes something else than this process, or dies too often.
        """
        job = self._ray.put((list(sys.path), self._task, verdicts, told))
        write = self._ray.remote(num_cpus=1, max_retries=RETRIES)(_write)
        running = {write.remote([job], job.hex(), one, folder.resolve()): one for one in shards}
        while running:
            (ready, *_), _ = self._ray.wait(list(running), num_returns=1)
            shard = running.pop(ready)
            try:
                self._ray.get(ready)
            except self._ray.exceptions.RayError as error:
                for one in running:
                    self._ray.cancel(one, force=True)
                cause = getattr(error, "cause", None)
                if isinstance(cause, (CheckpointError, OSError)):
                    raise cause from error
                raise CheckpointError(f"{shard.file}: {str(error).strip()}") from error
            say(f"written {shard.file}")


_made: dict[str, Any] = {}  # by the job: what this worker has made of it


def _write(job: list[Any], name: str, shard: Shard, folder: Path) -> None:
    if name not in _made:
        import ray

        _made.clear()
        declare_missing_ops()  # what the model is made of may import torchvision
        paths, pickled, verdicts, told = ray.get(job[0])
        sys.path += [one for one in paths if one not in sys.path]
        _made[name] = _again(ray.cloudpickle.loads(pickled), verdicts, told)
    task, files, found = _made[name]
    with bounded(files, task.memory):
        write_shard(shard, found.value, folder)


def _again(task: Task, verdicts: list[Any] | None, told: str) -> Any:
    files = Files(task.weights)
    with bounded(files, task.memory):
        again = None if verdicts is None else lambda _, leaves: Replayed(verdicts, leaves)
        found, *_ = task.done(files, again)
    if found.told() != told:
        raise CheckpointError(
            "a worker made another graph of the model than the process that started it"
        )
    return task, files, found
