"""Sweeps and checkpoints on a local Ray cluster, of which workers are killed."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import graphopt
from graphopt.builds.errors import ConfigError
from graphopt.fleet import checkpoint
from graphopt.fleet.mapped import CheckpointError
from graphopt.fleet.runners import Cluster, connected
from graphopt.fleet.sweeping import sweep
from graphopt.ir import ops
from tests.fleet.models import DIES_ONCE, answer
from tests.fleet.test_checkpoint import INPUT, empty, read, real, stored
from tests.fleet.test_sweep import configured, trial

pytest.importorskip("ray")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    with connected("local", 1) as ray:
        yield ray


@graphopt.rewrite
def unshift(op: ops.Linear, rw: Any) -> Any:
    """W x + b = W x, wrongly."""
    rw.require(op.bias is not None, "there is no bias")
    return rw.emit_like(op, bias=None)


def test_a_sweep_survives_a_worker_that_is_killed(tmp_path: Path, cluster: Any) -> None:
    (tmp_path / "swept_on_ray.py").write_text(DIES_ONCE)
    path = configured(tmp_path, sweep='metric = "tests.fleet.models:score"')
    path.write_text(path.read_text().replace("tests.fleet.models:net", "swept_on_ray:mortal"))
    found = sweep(path, ray="local")
    assert (tmp_path / "marker").exists()  # it was killed
    assert [one["status"] for one in found.results] == ["ok"] * 3
    assert sweep(path, ray="local").run == 0


def test_a_checkpoint_is_bit_for_bit_that_of_one_process(
    tmp_path: Path, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a rewrite that the checks take back, which workers do not run; and what goes wrong in a worker
    is told."""
    files = stored(real(), tmp_path)
    passes = graphopt.Pipeline([unshift, checkpoint.MERGE])

    def rewritten(name: str, ray: str | None) -> checkpoint.Rewritten:
        return graphopt.rewrite_checkpoint(
            empty(), INPUT, files, tmp_path / name, shard=300, passes=passes, ray=ray
        )

    one, other = rewritten("alone", None), rewritten("spread", "local")
    assert {each.rewrite for each in other.rolled_back} == {"unshift"}
    assert one.computed == other.computed > 0
    assert one.shards == other.shards and len(one.shards) > 2
    assert read(tmp_path / "spread").keys() == read(tmp_path / "alone").keys()
    for name in ("model.safetensors.index.json", *one.shards):
        assert (tmp_path / "alone" / name).read_bytes() == (tmp_path / "spread" / name).read_bytes()

    monkeypatch.setattr(checkpoint.Result, "told", lambda _: "something else")
    with pytest.raises(CheckpointError, match="a worker made another graph"):
        rewritten("wrong", "local")
    assert not (tmp_path / "wrong").exists()


def test_a_trial_that_always_dies_is_a_failed_one(tmp_path: Path, cluster: Any) -> None:
    runner = Cluster(cluster, 1, 1, 0, run=answer)
    runner.submit(trial(options={"dies": "always"}, folder=str(tmp_path)))
    _, found = runner.finished()
    assert found["status"] == "failed"
    assert found["reason"].startswith("its process died, 1 times: WorkerCrashedError")


def test_there_is_no_cluster_at_an_address() -> None:
    import ray

    ray.shutdown()
    with pytest.raises(ConfigError, match="--ray no-such-place: "):
        with connected("no-such-place"):
            pass
