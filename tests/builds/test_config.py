"""`graphopt.toml`: what a valid file means, and the line, the key and the message of every other one."""

from __future__ import annotations

import json
import textwrap
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from graphopt.builds import building
from graphopt.builds.config import Config, File, read
from graphopt.builds.errors import CODES, BuildError, ConfigError
from graphopt.builds.given import draw, dynamic_shapes
from graphopt.builds.toml import line_of
from graphopt.cli import app

VALID = """\
[model]
source = "nets:net"
weights = "weights.safetensors"

[inputs.image]
shape = ["batch", 3, 8, 8]
[inputs.scale]
shape = ["batch", 1]
dtype = "float64"
[inputs.tokens]
shape = [4]
dtype = "uint8"
high = 256

[dimensions.batch]
example = 3
min = 1
max = 64

[calibration]
file = "samples.npz"
batch = 16

[verify]
limit = 1e-8
inputs = 5
rolled_back = "allow"

[build]
output = "out"
lock = "my.lock"

[[targets]]
name = "cpu"
passes = "deploy,quantize{force=true}"
precision = "int8"
export = ["onnx", "pt2"]
budget = { error = 1e-3, bytes = 1_000_000 }

[[targets]]
name = "trainable"
mode = "tune"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "graphopt.toml"
    path.write_text(textwrap.dedent(text))
    return path


# -- a valid file -------------------------------------------------------------------------------


def test_what_a_file_says(tmp_path):
    file = read(written(tmp_path, VALID))
    config = file.config
    assert config.model.source == "nets:net" and not config.model.trust
    assert file.within(config.model.weights) == tmp_path / "weights.safetensors"
    assert list(config.inputs) == ["image", "scale", "tokens"]
    assert config.dimensions["batch"].example == file.example("batch") == 3
    assert config.calibration.batch == 16
    assert (config.verify.limit, config.verify.inputs) == (1e-8, 5)
    first, second = config.targets
    assert (first.name, first.mode, first.backend, first.precision) == (
        "cpu",
        "deploy",
        "eager",
        "int8",
    )
    assert first.budget.error == 1e-3 and first.budget.seconds is None
    assert (second.name, second.mode, second.export) == ("trainable", "tune", [])


def test_one_table_is_enough(tmp_path):
    config = read(written(tmp_path, 'model.source = "nets:net"\n')).config
    assert config == Config.model_validate({"model": {"source": "nets:net"}})
    assert [one.name for one in config.targets] == ["model"]


def test_inputs_are_drawn_as_described(tmp_path):
    file = read(written(tmp_path, VALID))
    first, again, other = draw(file, 0), draw(file, 0), draw(file, 1)
    assert {name: (one.dtype, tuple(one.shape)) for name, one in first.items()} == {
        "image": (torch.float32, (3, 3, 8, 8)), "scale": (torch.float64, (3, 1)),
        "tokens": (torch.uint8, (4,)),
    }  # fmt: skip
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not any(torch.equal(first[name], other[name]) for name in first)


def test_one_name_is_one_dimension(tmp_path):
    shapes = dynamic_shapes(read(written(tmp_path, VALID)))
    assert shapes["image"][0] is shapes["scale"][0]
    assert (shapes["image"][0].min, shapes["image"][0].max) == (1, 64)
    assert shapes["tokens"] == {}


def test_a_dimension_needs_no_table(tmp_path):
    text = '[model]\nsource = "a:b"\n[inputs.x]\nshape = ["n", 4]\n'
    assert draw(read(written(tmp_path, text)), 0)["x"].shape == (2, 4)


# -- malformed files ----------------------------------------------------------------------------

HEAD = '[model]\nsource = "nets:net"\n'  # two lines
INPUT = HEAD + '[inputs.x]\nshape = ["n", 4]\n'  # four

MALFORMED = [
    # what is written, the line, the key, the message
    ("", 1, "the file", "model is missing"),
    ("[model]\n", 1, "model", "source is missing"),
    ("# first\n\n[model]\nweights = 'w'\n", 3, "model", "source is missing"),
    ("model = 3\n", 1, "model", "found 3"),
    ("model = ['a']\n", 1, "model", "found ['a']"),
    ("[model]\nsource = 3\n", 2, "model.source", "expected a valid string, found 3"),
    ("[model]\nsource = ''\n", 2, "model.source", "at least 1 character"),
    ('[model]\nsource = "a\\nb"\n', 2, "model.source", "expected a name, found 'a\\nb'"),
    ('[model]\nsource = "a\\u0000b"\n', 2, "model.source", "expected a name"),
    ("[model]\nsorce = 'a:b'\n", 1, "model", "source is missing"),
    (HEAD + "wieghts = 'w'\n", 3, "model.wieghts", "unknown key; did you mean 'weights'?"),
    (HEAD + "zzz = 1\n", 3, "model.zzz", "unknown key; expected one of source, trust, weights"),
    (HEAD + "trust = 'yes'\n", 3, "model.trust", "expected a valid boolean, found 'yes'"),
    (HEAD + "trust = 1\n", 3, "model.trust", "expected a valid boolean, found 1"),
    (HEAD + "weights = ''\n", 3, "model.weights", "expected a name, found ''"),
    (HEAD + "weights = ['a']\n", 3, "model.weights", "expected a valid string"),
    (HEAD + "[modle]\n", 3, "modle", "unknown key; did you mean 'model'?"),
    (HEAD + "[target]\nname = 'a'\n", 3, "target", "unknown key; did you mean 'targets'?"),
    (HEAD + "[inputs]\nx = 3\n", 4, "inputs.x", "found 3"),
    (HEAD + "[inputs.x]\n", 3, "inputs.x", "shape is missing"),
    (HEAD + "[inputs.x]\nshape = 4\n", 4, "inputs.x.shape", "expected a valid list, found 4"),
    (HEAD + "[inputs.x]\nshape = [4.0]\n", 4, "inputs.x.shape[0]", "found 4.0"),
    (HEAD + "[inputs.x]\nshape = [2,\n 3,\n true]\n", 4, "inputs.x.shape[2]", "found True"),
    (HEAD + "[inputs.x]\nshape = [2, -1]\n", 4, "inputs.x.shape", "a size is -1, expected at least 0"),
    (HEAD + "[inputs.x]\nshape = ['2 n']\n", 4, "inputs.x.shape", "'2 n' is no name of a dimension"),
    (HEAD + "[inputs.x]\nshape = [99999999999]\n", 4, "inputs.x.shape", "99999999999 elements"),
    (HEAD + "[inputs.x]\nshape = [99999, 99999]\n", 4, "inputs.x.shape", "expected at most 2147483648"),
    (HEAD + "[inputs.x]\nshpe = [2]\nshape = [2]\n", 4, "inputs.x.shpe", "did you mean 'shape'?"),
    (INPUT + "dtype = 'float'\n", 5, "inputs.x.dtype", "found 'float'"),
    (INPUT + "dtype = 32\n", 5, "inputs.x.dtype", "found 32"),
    (INPUT + "dtype = 'int64'\n", 3, "inputs.x", "int64 needs high"),
    (INPUT + "dtype = 'int8'\nhigh = 129\n", 6, "inputs.x.high", "at most 128 for int8, found 129"),
    (INPUT + "high = 0\n", 5, "inputs.x.high", "greater than 0, found 0"),
    (INPUT + "high = 3\n", 5, "inputs.x.high", "at most 0 for float32, found 3"),
    (INPUT + "dtype = 'int64'\nhigh = 99999999999999999999\n", 6, "inputs.x.high", "at most 92233"),
    (INPUT + "[dimensions.m]\n", 4, "inputs.x.shape", "there is no dimension 'n'; expected one of m"),
    (INPUT + "[dimensions.nn]\n[dimensions.n]\n", 5, "dimensions.nn", "no input has this dimension"),
    (INPUT + "[dimensions.n]\nexample = 1\n", 6, "dimensions.n.example", "greater than or equal to 2"),
    (INPUT + "[dimensions.n]\nexample = 4\nmax = 3\n", 5, "dimensions.n", "found 1, 4, 3"),
    (INPUT + "[dimensions.n]\nmin = 3\n", 5, "dimensions.n", "expected min <= example <= max"),
    (INPUT + "[dimensions.n]\nmaximum = 3\n", 6, "dimensions.n.maximum", "did you mean 'max'?"),
    (INPUT + "[calibration]\n", 5, "calibration", "expected either file or callable"),
    (INPUT + "[calibration]\nfile = 'a'\ncallable = 'b:c'\n", 5, "calibration", "expected either"),
    (HEAD + "[calibration]\nfile = 'a'\n", 4, "calibration.file", "a file needs [inputs]"),
    (INPUT + "[calibration]\nfile = 'a'\nbatch = 0\n", 7, "calibration.batch", "found 0"),
    (INPUT + "[calibration]\nbacth = 3\n", 6, "calibration.bacth", "did you mean 'batch'?"),
    (HEAD + "[verify]\nlimit = 0.0\n", 4, "verify.limit", "greater than 0"),
    (HEAD + "[verify]\nlimit = nan\n", 4, "verify.limit", "finite number"),
    (HEAD + "[verify]\nlimit = inf\n", 4, "verify.limit", "finite number"),
    (HEAD + "[verify]\nlimit = '1e-3'\n", 4, "verify.limit", "found '1e-3'"),
    (HEAD + "[verify]\ninputs = 0\n", 4, "verify.inputs", "found 0"),
    (HEAD + "[verify]\ninputs = 2.5\n", 4, "verify.inputs", "found 2.5"),
    (HEAD + "[verify]\nrolled_back = 'ignore'\n", 4, "verify.rolled_back", "'fail' or 'allow'"),
    (HEAD + "[build]\nouput = 'a'\n", 4, "build.ouput", "did you mean 'output'?"),
    (HEAD + "[build]\noutput = ''\n", 4, "build.output", "expected a name, found ''"),
    (HEAD + '[build]\nlock = "a\\u0007"\n', 4, "build.lock", "expected a name"),
    (HEAD + "[targets]\nname = 'a'\n", 3, "targets", "expected a valid list"),
    ("targets = []\n" + HEAD, 1, "targets", "at least 1 item"),
    (HEAD + "[[targets]]\nname = '../up'\n", 4, "targets[0].name", "found '../up'"),
    (HEAD + "[[targets]]\nname = '/etc/x'\n", 4, "targets[0].name", "match pattern"),
    (HEAD + "[[targets]]\nname = '.hidden'\n", 4, "targets[0].name", "match pattern"),
    (HEAD + '[[targets]]\nname = "a\\n"\n', 4, "targets[0].name", "match pattern"),
    (HEAD + "[[targets]]\nname = 'a'\n[[targets]]\n\nname = 'a'\n", 7, "targets[1].name", "taken already"),
    (HEAD + "[[targets]]\n[[targets]]\n", 4, "targets[1].name", "'model' is taken already"),
    (HEAD + "[[targets]]\nmode = 'train'\n", 4, "targets[0].mode", "'deploy' or 'tune'"),
    (HEAD + "[[targets]]\nbackends = 'a'\n", 4, "targets[0].backends", "did you mean 'backend'?"),
    (HEAD + "[[targets]]\nbackend = 'openvin'\n", 4, "targets[0].backend", "did you mean openvino?"),
    (HEAD + "[[targets]]\npasses = 'fold-btch-norm'\n", 4, "targets[0].passes", "fold-batch-norm"),
    (HEAD + "[[targets]]\npasses = 'deploy,('\n", 4, "targets[0].passes", ""),
    (HEAD + "[[targets]]\npasses = 'no.such:thing'\n", 4, "targets[0].passes", "no module 'no'"),
    (HEAD + "[[targets]]\nprecision = 'fp8'\n", 4, "targets[0].precision", "'bf16' or 'int8'"),
    (HEAD + "[[targets]]\nmode = 'tune'\nprecision = 'bf16'\n", 5, "targets[0].precision", ""),
    (HEAD + "[[targets]]\nexport = 'onnx'\n", 4, "targets[0].export", "expected a valid list"),
    (HEAD + "[[targets]]\nexport = ['onx']\n", 4, "targets[0].export[0]", "found 'onx'"),
    (HEAD + "[[targets]]\nexport = ['pt2', 'pt2']\n", 4, "targets[0].export", "a format twice"),
    (HEAD + "[[targets]]\nmode = 'tune'\nexport = ['pt2']\n", 5, "targets[0].export", "mode 'deploy'"),
    (HEAD + "[[targets]]\nbudget = { eror = 1 }\n", 4, "targets[0].budget.eror", "did you mean 'error'?"),
    (HEAD + "[[targets]]\n[targets.budget]\nbytes = -1\n", 5, "targets[0].budget.bytes", "found -1"),
    (HEAD + "[[targets]]\n[targets.budget]\nseconds = nan\n", 5, "targets[0].budget.seconds", "nan"),
    (HEAD + "[[targets]]\n[targets.budget]\nparameters = 1.5\n", 5, "targets[0].budget.parameters", "1.5"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "line", "key", "message"), MALFORMED, ids=[f"{row[2]}-{n}" for n, row in enumerate(MALFORMED)]
)  # fmt: skip
def test_errors_name_the_line_the_key_and_what_was_expected(tmp_path, text, line, key, message):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        building.plan(read(path))
    said = str(caught.value)
    assert said.startswith(f"{path}:{line}: {key}: "), said
    assert message in said
    assert "\n" not in said and caught.value.code == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[model", ":1: not a TOML file: "),
        ("a = 1\n\nb = = 2\n", ":3: not a TOML file: Invalid value"),
        ("[model]\nsource = 'a'\nsource = 'b'\n", ":3: not a TOML file: Cannot overwrite a value"),
        ("[a]\n[a]\n", ":2: not a TOML file: Cannot declare"),
        ("a = " + "[" * 100_000, "not a TOML file: it is nested too deep"),
        ("a = " + "9" * 10_000, "not a TOML file: Exceeds the limit"),
        ("a = 'x\n", ":1: not a TOML file"),
        ("\x00", ":1: not a TOML file"),
    ],
)
def test_what_is_no_toml(tmp_path, text, message):
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        read(path)
    assert message in str(caught.value) and str(caught.value).startswith(str(path))


def test_what_is_no_text(tmp_path):
    path = tmp_path / "graphopt.toml"
    for make, message in (
        (lambda: None, "cannot be read: No such file"),
        (lambda: path.write_bytes(b"\xff\xfe\x00"), "not a text file"),
        (lambda: path.write_bytes(b"#" * (2 << 20)), "more than 1 MiB"),
        (lambda: (path.unlink(), path.mkdir()), "cannot be read: Is a directory"),
        (lambda: (path.rmdir(), path.symlink_to(path)), "cannot be read: Too many levels"),
    ):
        make()
        with pytest.raises(ConfigError, match=message):
            read(path)


@pytest.mark.parametrize(
    ("where", "line"),
    [
        ((), 1),
        (("model",), 2),
        (("model", "source"), 3),
        (("inputs", "x", "shape"), 4),  # an array over lines
        (("inputs", "y", "shape"), 9),  # a dotted key
        (("targets", 0), 10),
        (("targets", 0, "passes"), 11),  # a text over lines that looks like tables
        (("targets", 1, "name"), 17),
        (("targets", 1, "backend"), 16),  # not there: the table
        (("targets", 2), 10),
    ],
)
def test_lines_of_keys(where, line):
    text = textwrap.dedent('''\
        # text
        [model]
        source = "a"
        inputs.x.shape = [
          [1],
          # [targets]
          2,
        ]
        inputs.y.shape = [3]
        [[targets]]
        passes = """
        [model]
        [[targets]]
        name = "a"
        """
        [[targets]]
        name = "b"  # [model]
    ''')
    inner = {"inputs"} & set(where[:1])
    assert line_of(text, ("model", *where) if inner else where) == line


def test_the_line_of_a_key_in_a_large_file():
    text = "[model]\nsource = 'a'\n" + "".join(f"[inputs.i{n}]\nshape = [1]\n" for n in range(2000))
    assert line_of(text, ("inputs", "i1234", "shape")) == 2 + 2 * 1234 + 2


# -- the plan -----------------------------------------------------------------------------------


def command(*args: str) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, args)))
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def test_a_dry_run_prints_the_plan_and_does_nothing(tmp_path):
    code, text = command("build", written(tmp_path, VALID), "--dry-run")
    assert code == 0
    for line in (
        "model      nets:net", "weights    weights.safetensors", "input      image: float32 [batch, 3, 8, 8]",
        "dimension  batch: 1 to 64, captured with 3", "target     cpu -> out/cpu.gopt",
        "  backend  eager, int8", "  export   onnx, pt2", "  budget   error 0.001, bytes 1e+06",
        "target     trainable -> out/trainable.gopt",
    ):  # fmt: skip
        assert line in text.splitlines()
    assert [one.name for one in tmp_path.iterdir()] == ["graphopt.toml"]


def test_a_dry_run_for_machines(tmp_path):
    code, text = command(
        "build", written(tmp_path, VALID), "--dry-run", "--json", "--target", "cpu"
    )
    data = json.loads(text)
    assert code == 0 and data["versions"]["torch"].startswith(torch.__version__.partition("+")[0])
    assert [one["name"] for one in data["plan"]["targets"]] == ["cpu"]
    assert "quantize" in data["plan"]["targets"][0]["passes"]


def test_an_error_is_one_line_and_json_on_demand(tmp_path):
    path = written(tmp_path, HEAD + "wieghts = 'w'\n")
    code, text = command("build", path)
    assert (
        code == 2 and text.strip().startswith("graphopt: ") and len(text.strip().splitlines()) == 1
    )
    code, text = command("build", path, "--json")
    data = json.loads(next(line for line in text.splitlines() if line.startswith("{")))
    assert (
        code == data["code"] == 2 and not data["ok"] and "did you mean 'weights'?" in data["error"]
    )


def test_targets_are_chosen_by_name(tmp_path):
    code, text = command("build", written(tmp_path, VALID), "--dry-run", "--target", "cqu")
    assert code == 2 and "there is no target 'cqu'; did you mean 'cpu'?" in text


def test_every_kind_of_error_has_a_code_of_its_own():
    kinds = BuildError.__subclasses__()
    assert sorted(one.code for one in kinds) == [2, 3, 4, 5, 6, 7]
    assert sorted(CODES) == list(range(8))
    code, text = command("build", "--help")
    assert code == 0 and all(f"{number} " in text for number in CODES if number != 1)


def test_a_file_needs_no_disk():
    assert File(Path("x.toml"), HEAD).config.model.source == "nets:net"


# -- graphopt init ------------------------------------------------------------------------------


def test_init_refuses_to_overwrite(tmp_path):
    path = written(tmp_path, HEAD)
    code, text = command("init", "nets:net", "-o", path)
    assert code == 2 and "exists; not overwriting it" in text and path.read_text() == HEAD


def test_init_of_what_there_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, text = command("init", "no_such_module:net")
    assert code == 2 and "no module 'no_such_module'" in text and not list(tmp_path.iterdir())
