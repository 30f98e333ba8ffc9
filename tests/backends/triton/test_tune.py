"""Choosing blocks and capturing graphs, with a clock and a device that are made up."""

from __future__ import annotations

import pytest
import torch

from graphopt.backends.triton import graphs
from graphopt.backends.triton.blocks import gpu_blocks, grid
from graphopt.backends.triton.source import EVEN, Printed
from graphopt.backends.triton.tune import Cache, Choice, fastest, key_of


class OutOfResources(Exception):
    pass


def _clock(function):
    return function()


def test_the_fastest_that_fits():
    times = {1: 3.0, 2: OutOfResources(), 3: 1.0, 4: 2.0}
    candidates = [Choice({"BLOCK": one}) for one in times]

    def run(choice):
        found = times[choice.blocks["BLOCK"]]
        if isinstance(found, Exception):
            raise found
        return found

    assert fastest(candidates, run, _clock) == Choice({"BLOCK": 3})
    with pytest.raises(RuntimeError, match="no block shape fits"):
        fastest(candidates[1:2], run, _clock)

    def broken(choice):
        raise ValueError("a wrong kernel")

    with pytest.raises(ValueError, match="a wrong kernel"):
        fastest(candidates, broken, _clock)


def test_choices_are_remembered_and_shared(tmp_path):
    path = tmp_path / "deep" / "blocks.json"
    one, two = Cache(path), Cache(path)
    one.add("a", Choice({"ROWS": 2}, 8))
    two.add("b", Choice(None))
    again = Cache(path)
    assert again.find("a") == Choice({"ROWS": 2}, 8)
    assert again.find("b") == Choice(None)
    assert again.find("c") is None
    path.write_text("not json")
    assert Cache(path).find("a") is None


def test_the_key_tells_device_kernel_and_size_apart():
    key = key_of("H200", "source", (1000, 64))
    assert key == key_of("H200", "source", (513, 64))
    assert len({key, key_of("A100", "source", (1000, 64)), key_of("H200", "other", (1000, 64)),
                key_of("H200", "source", (1025, 64))}) == 4  # fmt: skip


@pytest.mark.parametrize(
    ("form", "extent"),
    [("pointwise", (5000, 1)), ("persistent", (77, 300)), ("looped", (5, 10**6)),
     ("product", (100, 70, 3, 64))],
)  # fmt: skip
def test_every_candidate_covers_the_extent(form, extent):
    for blocks, warps in gpu_blocks(form, extent[1]):
        programs = grid(Printed("", form, ()), blocks, extent)
        assert warps in (1, 2, 4, 8, 16)
        assert all(size == 1 << (size.bit_length() - 1) for size in blocks.values())
        if form == "pointwise":
            assert programs[0] * blocks["BLOCK"] >= extent[0]
            assert EVEN % blocks["BLOCK"] == 0
        elif form == "product":
            assert programs[0] * blocks["ROWS"] * blocks["COLUMNS"] >= extent[0] * extent[1]
            assert programs[1] == 3
        else:
            assert programs[0] * blocks["ROWS"] >= extent[0]
            assert form == "looped" or blocks["COLUMNS"] >= extent[1]


# -- CUDA graphs ---------------------------------------------------------------------------------


def _fake_capture(log):
    def capture(run, inputs):
        outputs = run(*inputs)

        def replay():
            log.append("replay")
            for place, one in zip(outputs, run(*inputs), strict=True):
                place.copy_(one)

        log.append("capture")
        return replay, outputs

    return capture


def test_a_shape_is_captured_once_and_results_are_copies():
    log: list[str] = []
    captured = graphs.Graphs(lambda x: (x * 2,), _fake_capture(log))
    first = captured([torch.tensor([1.0, 2.0])])[0]
    second = captured([torch.tensor([3.0, 4.0])])[0]
    assert first.tolist() == [2.0, 4.0]
    assert second.tolist() == [6.0, 8.0]
    captured([torch.ones(3)])
    assert log == ["capture", "replay", "replay", "capture", "replay"]


def test_what_cannot_be_captured_runs_as_it_is():
    def capture(run, inputs):
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    captured = graphs.Graphs(lambda x: (x * 2,), capture)
    for _ in range(2):
        assert captured([torch.ones(2)])[0].tolist() == [2.0, 2.0]
    assert captured.notes == [
        "not captured in a CUDA graph: operation not permitted when stream is capturing"
    ]


def test_only_so_many_shapes_are_captured():
    log: list[str] = []
    captured = graphs.Graphs(lambda x: (x * 2,), _fake_capture(log))
    for size in range(1, graphs.MOST_SHAPES + 3):
        assert captured([torch.ones(size)])[0].numel() == size
    assert log.count("capture") == graphs.MOST_SHAPES


def test_inputs_elsewhere_and_writes_are_not_captured():
    assert not graphs.may_capture([torch.ones(2)], writes=False)
    assert not graphs.may_capture([], writes=False)
