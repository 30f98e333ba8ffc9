"""The specification of `graphopt.export`: files that need no graphopt and compute what the model does."""

from __future__ import annotations

import copy
import subprocess
import sys
import textwrap
import zipfile
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import graphopt
from graphopt import ExportError, export
from graphopt.backends import inductor, onnxruntime, openvino
from graphopt.ir.recurrence.operator import SCAN
from tests.helpers import Counting, Net, Spike, relative_error

pytestmark = pytest.mark.skipif(
    bool(openvino.missing() or onnxruntime.missing()),
    reason=openvino.missing() or onnxruntime.missing(),
)
LIMIT = 1e-5
module = sys.modules["graphopt.export"]


class Spiking(nn.Module):
    """A loop over time that becomes one `graphopt::scan`, nested inputs and results."""

    def __init__(self) -> None:
        super().__init__()
        self.maps = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(5), nn.Linear(6, 4))

    def forward(self, x, *, extra, unread=None):
        x = self.maps(x) + extra["shift"]
        v, spikes = torch.zeros_like(x[:, 0]), []
        for t in range(5):
            v = 0.5 * v + x[:, t]
            spike = (v >= 0.3).to(v.dtype)
            v = v - spike
            spikes.append(spike)
        return {
            "spikes": torch.stack(spikes, 1),
            "rest": (v.sigmoid(), v.argmax(1), extra["shift"]),
        }


def inputs(rows: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x, shift = (torch.randn(rows, 5, 4, generator=generator) for _ in range(2))
    return (x,), {"extra": {"shift": shift}, "unread": torch.zeros(rows, 2)}


PASSES = "canonicalize,fold-batch-norm,roll-steps,canonicalize,materialize,canonicalize"
NAMES = ("x", "extra['shift']"), ("spikes", "rest_0", "rest_1")


@pytest.fixture(scope="module")
def fast():
    torch.manual_seed(0)
    args, kwargs = inputs(2)
    found = graphopt.optimize(Spiking().eval(), args, kwargs, passes=PASSES)
    assert any(node.target is SCAN for node in found.graph_module.graph.nodes)
    return found


FILES = {"onnx": "model.onnx", "openvino": "model.xml", "pt2": "model.pt2"}


@pytest.fixture(scope="module")
def written(fast, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / "deep"
    return {name: export(fast, folder / file) for name, file in FILES.items()}


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """The same for AOTInductor, which takes long: the smallest model there is."""
    torch.manual_seed(0)
    tiny = graphopt.optimize(nn.Sequential(nn.Linear(4, 4), nn.ReLU()).eval(), (torch.randn(2, 4),))
    return tiny, export(tiny, tmp_path_factory.mktemp("compiled") / "model.aoti.pt2")


LOADER = """
    import sys

    class Forbidden:
        def find_spec(self, name, path=None, target=None):
            assert name.partition(".")[0] != "graphopt", name

    sys.meta_path.insert(0, Forbidden())
    import torch

    folder = sys.argv[1]
    given = torch.load(folder + "/inputs.pt")

    def by_name(args, kwargs):
        return {"x": args[0].numpy(), "extra['shift']": kwargs["extra"]["shift"].numpy()}

    def onnx():
        import onnxruntime
        session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()], [one.name for one in session.get_outputs()]
        found = [session.run(None, by_name(*one)) for one in given]
        return names, [list(map(torch.as_tensor, one)) for one in found]

    def openvino():
        import openvino
        model = openvino.Core().read_model(folder + "/model.xml")
        names = [[port.any_name for port in ports] for ports in (model.inputs, model.outputs)]
        run = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        found = [dict(run(by_name(*one)).to_dict()) for one in given]
        found = [{port.any_name: value for port, value in one.items()} for one in found]
        return names, [[torch.as_tensor(one[name]).clone() for name in names[1]] for one in found]

    def pt2():
        run = torch.export.load(folder + "/model.pt2").module()
        found = [run(*args, **kwargs) for args, kwargs in given]
        assert found[0]["rest"][2] is given[0][1]["extra"]["shift"]
        return None, [[one["spikes"], *one["rest"][:2]] for one in found]

    torch.save({one.__name__: one() for one in (onnx, openvino, pt2)}, folder + "/found.pt")
    assert "graphopt" not in sys.modules
"""


ROWS = (1, 7)


@pytest.fixture(scope="module")
def found(written):
    """What a process without graphopt computes with the files."""
    folder = written["pt2"].path.parent
    torch.save([inputs(rows, seed=1) for rows in ROWS], folder / "inputs.pt")
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(LOADER), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    return torch.load(folder / "found.pt")


@pytest.mark.parametrize("name", FILES)
def test_loaded_where_graphopt_is_not(fast, found, name):
    names, computed = found[name]
    for rows, one in zip(ROWS, computed, strict=True):
        args, kwargs = inputs(rows, seed=1)
        with torch.no_grad():
            expected = fast(*args, **kwargs)
        assert relative_error(one, [expected["spikes"], *expected["rest"][:2]]) < LIMIT
    assert names is None or tuple(map(tuple, names)) == NAMES


@pytest.mark.skipif(bool(inductor.missing()), reason=inductor.missing())
def test_compiled_ahead_of_time(compiled, tmp_path):
    tiny, result = compiled
    assert result.format == "aotinductor" and result.error < LIMIT
    code = f"""
        import sys
        class Forbidden:
            def find_spec(self, name, path=None, target=None):
                assert name.partition(".")[0] != "graphopt", name
        sys.meta_path.insert(0, Forbidden())
        import torch, torch._inductor
        run = torch._inductor.aoti_load_package({str(result.path)!r})
        torch.save([run(torch.ones(rows, 4)).detach() for rows in (1, 7)], "found.pt")
    """
    command = [sys.executable, "-W", "ignore", "-c", textwrap.dedent(code)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        expected = [tiny(torch.ones(rows, 4)) for rows in (1, 7)]
    assert relative_error(torch.load(tmp_path / "found.pt"), expected) < LIMIT


def test_the_result_says_what_was_written(written):
    for name, result in written.items():
        assert result.format == name and all(one.is_file() for one in result.files)
        assert result.error < LIMIT and result.own_error < LIMIT
    assert [one.name for one in written["openvino"].files] == ["model.xml", "model.bin"]
    onnx = written["onnx"]
    assert (onnx.inputs, onnx.outputs, onnx.left_out) == (*NAMES, ("unread", "rest_2"))
    assert written["pt2"].left_out == () and "unread" in written["pt2"].inputs
    assert "error against float64" in str(onnx) and "unread, rest_2" in str(onnx)
    assert sorted(one.name for one in onnx.path.parent.glob(".*")) == []


def test_nothing_of_this_package_and_this_machine_is_in_the_files(written):
    for result in written.values():
        parts = [one.read_bytes() for one in result.files]
        if result.format == "pt2":
            with zipfile.ZipFile(result.path) as archive:
                parts = [archive.read(one) for one in archive.namelist()]
        for part in parts:
            assert (
                b"graphopt" not in part and str(Path(__file__).parent.parent).encode() not in part
            )


def test_the_same_bytes_again(fast, written, tmp_path):
    again = export(fast, tmp_path / FILES["pt2"])
    assert [one.read_bytes() for one in again.files] == [
        one.read_bytes() for one in written["pt2"].files
    ]


def test_weights_of_ir_files_are_not_rounded(written, fast):
    size = sum(one.numel() for one in fast.parameters())
    assert written["openvino"].path.with_suffix(".bin").stat().st_size >= 4 * size


@pytest.fixture(scope="module")
def odd():
    inner = Net(lambda net, x: torch.special.bessel_j0(x))
    model = Net(lambda net, x: net.inner(x) + 1, inner=inner)
    return graphopt.optimize(model.eval(), (torch.randn(2, 3),))


@pytest.mark.parametrize("name", ["onnx", "openvino"])
def test_what_a_format_cannot_hold_is_named_and_the_old_file_stays(odd, name, tmp_path):
    path = tmp_path / FILES[name]
    path.write_text("old")
    with pytest.raises(ExportError) as raised:
        export(odd, path)
    text = str(raised.value)
    assert (
        text.startswith(f"{name}: ")
        and "aten.special_bessel_j0 at inner" in text
        and ".pt2" in text
    )
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_computes_something_else_is_not_kept(name, tmp_path, monkeypatch):
    model = graphopt.optimize(nn.Linear(3, 2).eval(), (torch.randn(2, 3),))
    path = tmp_path / FILES[name]
    path.write_text("old")
    write = module.FORMATS[name]

    def wrong(source, path):
        loaded, *ends = write(source, path)
        return lambda args, kwargs: [1.001 * one for one in loaded(args, kwargs)], *ends

    monkeypatch.setitem(module.FORMATS, name, wrong)
    with pytest.raises(ExportError, match=rf"{name}: .*computes something else.*1\.0e-03"):
        export(model, path)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_size_that_the_file_fixes_is_found(tmp_path, monkeypatch):
    """Inputs of another size are tried where the graph takes any."""
    model = graphopt.optimize(nn.Linear(3, 2).eval(), (torch.randn(2, 3),))
    traced = module.traced_inputs
    monkeypatch.setattr(module, "traced_inputs", lambda *given: traced(*given[:2], False))
    with pytest.raises(ExportError, match=r"does not run on inputs of \[3, 3\]"):
        export(model, tmp_path / "model.pt2")
    assert not list(tmp_path.iterdir())


def test_what_rounding_decides_is_no_error(tmp_path):
    """The value just at a threshold may fall on either side, in the file as in any run by torch."""

    def body(net, x):
        return (net.b(F.relu(net.a(x))) >= net.level).float()

    torch.manual_seed(0)
    level = nn.Parameter(torch.zeros(4, 8))
    model = Net(body, a=nn.Linear(32, 64), b=nn.Linear(64, 8), level=level).eval()
    x = torch.randn(4, 32)
    with (
        torch.no_grad()
    ):  # where the outputs of torch and in float64 are one all over, by a rounding
        wide = copy.deepcopy(model).double()
        exact = wide.b(F.relu(wide.a(x.double()))).float()
        own = model.b(F.relu(model.a(x)))
        level.copy_(torch.minimum(own, exact.nextafter(torch.tensor(-9.0))))
    fast = graphopt.optimize(model, (x,), passes="canonicalize", dynamic_shapes={"args": ({},)})
    result = export(fast, tmp_path / "model.xml", x)
    assert result.own_error == 0 and result.error > 1e-2


def test_states_are_kept_by_the_format_that_has_them(tmp_path):
    fast = graphopt.optimize(Counting().eval(), (torch.randn(2, 3),))
    with pytest.raises(ExportError, match="writes to calls"):
        export(fast, tmp_path / "model.onnx")
    export(fast, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    x = torch.randn(2, 3)
    assert torch.equal(loaded(x), x + 1) and torch.equal(loaded(x), x + 2)
    assert torch.equal(fast.calls, torch.zeros(1))


@pytest.mark.parametrize("name", ["onnx", "pt2"])
def test_a_model_that_trains(name, tmp_path):
    """Its custom gradients are not in the file."""
    model = Net(lambda net, x: Spike.apply(net.l(x)), l=nn.Linear(3, 2))
    fast = graphopt.optimize(model.eval(), (torch.randn(2, 3),), mode="tune")
    assert export(fast, tmp_path / FILES[name]).error == 0


def test_outputs_with_the_names_of_other_values(tmp_path):
    """In ONNX inputs, weights, outputs and what is computed share one space of names."""

    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(8, 8)

        def forward(self, x):
            y = self.linear(x)
            a = torch.relu(y)
            return {
                "x": y,
                "relu": a.sigmoid(),
                "sigmoid": a,
                "linear": y.tanh(),
                "linear.weight": y + 1,
                "x_out": y + 2,
            }

    model, x = Named().eval(), torch.randn(3, 8)
    written = graphopt.optimize(model, (x,)).export(tmp_path / "named.onnx")
    names = "x_out", "relu", "sigmoid", "linear", "linear.weight_out", "x_out_out"
    assert written.outputs == names
    session = onnxruntime.session(written.path, 1)
    found = session.run(list(written.outputs), {"x": x.numpy()})
    for one, expected in zip(found, model(x).values(), strict=True):
        assert relative_error(torch.as_tensor(one), expected.detach()) < 1e-6


def test_sizes_that_are_dynamic_are_as_captured(tmp_path):
    """Two pixels are too few for two convolutions."""
    layers = nn.Conv2d(3, 4, 3, 2), nn.ReLU(), nn.Conv2d(4, 4, 3, 2)
    model, auto = nn.Sequential(*layers).eval(), torch.export.Dim.AUTO
    shapes = ({0: auto, 2: auto, 3: auto},)
    fast = graphopt.optimize(model, (torch.randn(2, 3, 32, 24),), dynamic_shapes=shapes)
    fast.save(tmp_path / "model")
    for one in (fast, graphopt.load(tmp_path / "model")):
        assert one.example_inputs()[0][0].shape == (2, 3, 32, 24)
        assert one.export(tmp_path / "model.pt2").error < 1e-5


def test_whole_numbers_are_not_all_the_same(tmp_path):
    class Masked(nn.Module):
        def forward(self, x, mask, kind):
            return x.masked_fill(mask, 0.0) + kind

    inputs = torch.randn(2, 64), torch.ones(2, 64, dtype=torch.bool), torch.ones(2, 64).long()
    _, mask, kind = graphopt.optimize(Masked().eval(), inputs).example_inputs()[0]
    assert (mask.dtype, kind.dtype) == (torch.bool, torch.int64)
    assert set(mask.flatten().tolist()) == {False, True} and set(kind.flatten().tolist()) == {0, 1}


def test_inputs_of_the_caller(tmp_path):
    fast = graphopt.optimize(nn.Embedding(9, 3), (torch.randint(0, 9, (2, 4)),))
    x = torch.randint(0, 9, (5, 4))
    assert export(fast, tmp_path / "model.onnx", x).inputs == ("input",)
    with pytest.raises(graphopt.InputError, match="expected int64"):
        export(fast, tmp_path / "model.onnx", (torch.zeros(5, 5, 5),))


def test_what_cannot_be_exported_is_said(fast, tmp_path, monkeypatch):
    raises = pytest.raises
    with raises(ExportError, match=r"\.onnx, \.xml, \.aoti\.pt2, \.pt2"):
        export(fast, tmp_path / "model.tflite")
    with raises(ExportError, match=r"ends with \.xml for the format openvino"):
        export(fast, tmp_path / "model.onnx", format="openvino")
    with raises(ExportError, match="unknown format 'tflite'; expected one of onnx"):
        export(fast, tmp_path / "model.onnx", format="tflite")
    with raises(TypeError, match=r"graphopt\.optimize, found Linear"):
        export(nn.Linear(2, 2), tmp_path / "model.onnx")
    (tmp_path / "folder.onnx").mkdir()
    with raises(ExportError, match="is a folder"):
        export(fast, tmp_path / "folder.onnx")
    monkeypatch.setattr(onnxruntime, "missing", lambda: "nothing is installed")
    with raises(ExportError, match="onnx: nothing is installed"):
        export(fast, tmp_path / "model.onnx")

    class Branch(nn.Module):
        def forward(self, x):
            return x + 1 if float(x.sum()) > 0 else x - 1

    parts = graphopt.optimize(nn.Sequential(nn.Linear(2, 2), Branch()), (torch.randn(2, 2),))
    with raises(ExportError, match="captured by region"):
        export(parts, tmp_path / "model.pt2")
