"""The specification of `fold-batch-norm`: where a norm goes, where it stays and why.

    y = s * (W x + b) + t  =  (s W) x + (s b + t)      producer side
    y = W (s * x + t) + b  =  (W s) x + (b + W t)      consumer side

`folds` and `stays` run a model through both modes. Sections follow the geometry of the fold: what
produces the norm's input, what stands between, what reads the norm, and the shape of the graph.
"""

from __future__ import annotations

import re
import textwrap

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import graphopt
from graphopt.ir.capture import capture
from graphopt.ir.driver import Session
from graphopt.passes.fold_batch_norm import FoldBatchNorm
from graphopt.passes.materialize import Materialize
from graphopt.torchvision_ops import declare_missing_ops
from tests.helpers import (
    EXACT,
    Lambda,
    Net,
    assert_equal,
    calls,
    gradient_error,
    gradients,
    norms_left,
    output_of,
    prepare,
    reasons,
    relative_error,
    snapshot,
    tensor,
)

CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
CONV_TRANSPOSE = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORM = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE_NORM = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
SPATIAL = (7, 6, 5)
IMAGE = (2, 4, 7, 6)


def optimized(
    model: nn.Module, shapes: tuple[tuple[int, ...], ...], mode: str, **options: object
) -> graphopt.OptimizedModule:
    """`model` (prepared) optimized, its outputs and Tune gradients checked, nothing rolled back."""
    inputs = tuple(tensor(*shape, seed=i) for i, shape in enumerate(shapes))
    unchanged = snapshot(model)
    fast = graphopt.optimize(model, inputs, mode=mode, **options)
    unchanged()
    assert fast.report.rolled_back == []
    for rows in (inputs, tuple(one.flip(0) * 2 for one in inputs)):
        assert_equal(output_of(fast, rows), output_of(model, rows))
    if mode == "tune":
        assert gradient_error(gradients(fast, inputs), gradients(model, inputs)) <= EXACT
    return fast


def folds(model: nn.Module, *shapes: tuple[int, ...]) -> graphopt.OptimizedModule:
    """Every norm goes, in both modes. Returns the Deploy form."""
    prepare(model)
    assert norms_left(optimized(model, shapes, "tune")) == 0
    fast = optimized(model, shapes, "deploy")
    assert norms_left(fast) == 0
    return fast


def stays(
    model: nn.Module,
    *shapes: tuple[int, ...],
    because: str,
    where: str | None = None,
    left: int = 1,
) -> graphopt.OptimizedModule:
    """`left` norms stay, one of them (at `where`) for a reason that contains `because`."""
    prepare(model)
    for mode in ("tune", "deploy"):
        fast = optimized(model, shapes, mode)
        assert norms_left(fast) == left, f"{norms_left(fast)} norms left: {reasons(fast)}"
        assert because in reasons(fast, where), reasons(fast)
    return fast


def right(model: nn.Module, *shapes: tuple[int, ...]) -> graphopt.OptimizedModule:
    """Folded or not is not specified, but every norm left has a reason."""
    prepare(model)
    for mode in ("tune", "deploy"):
        fast = optimized(model, shapes, mode)
        assert norms_left(fast) == 0 or reasons(fast)
    return fast


def between(*ops: nn.Module, out: int = 4) -> nn.Sequential:
    """conv -> ops -> norm over `out` channels."""
    return nn.Sequential(nn.Conv2d(4, 4, 3), *ops, nn.BatchNorm2d(out))


def conv(out: int = 4, into: int = 4, **options: object) -> nn.Conv2d:
    return nn.Conv2d(into, out, 3, **{"padding": 1, **options})


# -- producer side: W' = s W, b' = s b + t ------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True], ids=["conv", "transposed"])
@pytest.mark.parametrize(
    ("groups", "out"), [(1, 6), (1, 4), (2, 4), (2, 6), (4, 4), (4, 8)],
    ids=["dense", "square", "grouped square", "grouped", "depthwise", "depthwise x2"],
)  # fmt: skip
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_convolutions(rank: int, groups: int, out: int, transposed: bool) -> None:
    """Every rank, plain and transposed, with every way to group channels."""
    table = CONV_TRANSPOSE if transposed else CONV
    bias = groups == 2
    producer = table[rank](4, out, 3, stride=2, padding=1, groups=groups, bias=bias)
    fast = folds(nn.Sequential(producer, NORM[rank](out)), (2, 4, *SPATIAL[:rank]))
    assert calls(fast) == [f"conv_transpose{rank}d" if transposed else f"conv{rank}d"]


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": (1, 3), "stride": (2, 1)},
        {"kernel_size": 3, "dilation": (2, 1)},
        {"kernel_size": (3, 2), "padding": (0, 2)},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": (2, 3), "padding": "same", "dilation": (1, 2)},
        {"kernel_size": 3, "padding": "valid", "stride": 3},
        {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
        {"kernel_size": 3, "padding": (2, 1), "padding_mode": "replicate", "stride": 2},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
        {"kernel_size": 2, "padding": "same", "padding_mode": "circular"},
    ],
    ids=str,
)
def test_conv_geometry(options: dict[str, object]) -> None:
    """Stride, dilation and padding of the producer do not matter, only its channels do."""
    folds(nn.Sequential(nn.Conv2d(4, 5, **options), nn.BatchNorm2d(5)), IMAGE)


@pytest.mark.parametrize(
    "options",
    [
        {"stride": 3, "output_padding": 2},
        {"stride": (2, 1), "output_padding": (1, 0), "padding": 1},
        {"dilation": 2, "output_padding": 1},
    ],
    ids=str,
)
def test_transposed_geometry(options: dict[str, object]) -> None:
    folds(nn.Sequential(nn.ConvTranspose2d(4, 5, 3, **options), nn.BatchNorm2d(5)), IMAGE)


def test_unbatched_convolution_stays() -> None:
    """Without a batch axis, axis 1 is not the channels, even where the sizes agree."""
    model = nn.Sequential(nn.Conv1d(4, 5, 3, padding=1), nn.BatchNorm1d(5))
    stays(model, (4, 5), because="axis")


def test_linear() -> None:
    fast = folds(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5)), (4, 3))
    assert calls(fast) == ["linear"]
    folds(nn.Sequential(nn.Linear(3, 5, bias=False), nn.BatchNorm1d(5, affine=False)), (4, 3))


@pytest.mark.parametrize("features", [5, 6], ids=["L = C", "L != C"])
def test_linear_over_a_sequence_stays(features: int) -> None:
    """BatchNorm1d normalizes axis 1 of (N, L, C), which is not the features."""
    model = nn.Sequential(nn.Linear(3, features), nn.BatchNorm1d(5))
    stays(model, (2, 5, 3), because="axis 2, the norm's channels on axis 1")


def test_linear_over_a_sequence_transposed() -> None:
    """linear -> transpose -> BatchNorm1d: now they are."""
    swap = Lambda(lambda y: y.transpose(1, 2))
    folds(nn.Sequential(nn.Linear(3, 5), swap, nn.BatchNorm1d(5)), (2, 5, 3))
    folds(nn.Sequential(nn.Linear(3, 5), swap, nn.BatchNorm1d(5)), (2, 6, 3))
    folds(nn.Sequential(nn.Linear(3, 5), swap, nn.BatchNorm1d(5), swap), (2, 6, 3))


def test_matrix_products() -> None:
    """x @ W and b + x @ W are linear maps too."""
    weight, bias = nn.Parameter(tensor(3, 5)), nn.Parameter(tensor(5))
    folds(Net(lambda m, x: m.bn(x @ m.w), w=weight, bn=nn.BatchNorm1d(5)), (4, 3))
    folds(Net(lambda m, x: m.bn(torch.addmm(m.b, x, m.w)), w=weight, b=bias,
              bn=nn.BatchNorm1d(5)), (4, 3))  # fmt: skip
    folds(Net(lambda m, x: m.bn(x @ m.w + m.b), w=weight, b=bias, bn=nn.BatchNorm1d(5)), (4, 3))
    stays(
        Net(lambda m, x: m.bn(x @ m.w), w=weight, bn=nn.BatchNorm1d(5)), (2, 5, 3), because="axis"
    )


def test_product_of_activations_stays() -> None:
    """Neither operand is a parameter: there is nothing to scale."""
    model = Net(lambda m, x: m.bn(x.transpose(1, 2) @ x), bn=nn.BatchNorm1d(4))
    stays(model, (2, 4, 4), because="")


def test_affine_free_norm() -> None:
    folds(nn.Sequential(conv(5), nn.BatchNorm2d(5, affine=False)), IMAGE)
    folds(nn.Sequential(conv(5, bias=False), nn.BatchNorm2d(5, affine=False)), IMAGE)


def test_eps_is_part_of_the_scale() -> None:
    """An eps that matters, and one that is all there is (running_var = 0)."""
    folds(nn.Sequential(conv(5), nn.BatchNorm2d(5, eps=0.3)), IMAGE)
    model = prepare(nn.Sequential(conv(5), nn.BatchNorm2d(5)))
    model[1].running_var.zero_()
    assert norms_left(optimized(model, (IMAGE,), "deploy")) == 0


@pytest.mark.parametrize("gamma", [0.0, -1.5], ids=["zero", "negative"])
def test_gamma_of_any_sign(gamma: float) -> None:
    """gamma = 0 leaves the constant beta; the producer's channel is multiplied by zero."""
    model = prepare(nn.Sequential(conv(5), nn.BatchNorm2d(5)))
    nn.init.constant_(model[1].weight, gamma)
    for mode in ("tune", "deploy"):
        assert norms_left(optimized(model, (IMAGE,), mode)) == 0


def test_a_norm_without_bias_or_without_weight() -> None:
    """F.batch_norm takes either alone."""

    def body(m: Net, x: Tensor) -> Tensor:
        y = F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var, weight=m.bn.weight)
        y = F.batch_norm(m.conv(F.relu(y)), m.bn.running_mean, m.bn.running_var, bias=m.bn.bias)
        return y

    folds(Net(body, conv=conv(), bn=nn.BatchNorm2d(4)), IMAGE)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_instance_norm_with_running_statistics(rank: int) -> None:
    """In eval mode it is a batch norm."""
    norm = INSTANCE_NORM[rank](5, affine=rank > 1, track_running_stats=True)
    folds(nn.Sequential(CONV[rank](4, 5, 3), norm), (2, 4, *SPATIAL[:rank]))


def test_instance_norm_without_running_statistics_is_left_alone() -> None:
    model = prepare(nn.Sequential(conv(5), nn.InstanceNorm2d(5, affine=True)))
    assert "instance_norm" in calls(optimized(model, (IMAGE,), "deploy"))


def test_synchronized_norm() -> None:
    folds(nn.Sequential(conv(5), nn.SyncBatchNorm(5)), IMAGE)


class FrozenBatchNorm(nn.Module):
    """As detection libraries write it: four buffers and plain arithmetic."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.register_buffer("weight", tensor(channels, seed=1))
        self.register_buffer("bias", tensor(channels, seed=2))
        self.register_buffer("running_mean", tensor(channels, seed=3))
        self.register_buffer("running_var", tensor(channels, seed=4).abs() + 0.1)

    def forward(self, x: Tensor) -> Tensor:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        scale = self.weight.reshape(shape) * (self.running_var.reshape(shape) + 1e-5).rsqrt()
        return x * scale + (self.bias.reshape(shape) - self.running_mean.reshape(shape) * scale)


class SlowFrozenBatchNorm(FrozenBatchNorm):
    """The definition, step by step."""

    def forward(self, x: Tensor) -> Tensor:
        def column(vector: Tensor) -> Tensor:
            return vector[None, :, None, None]

        x = (x - column(self.running_mean)) / torch.sqrt(column(self.running_var) + 1e-5)
        return x * column(self.weight) + column(self.bias)


@pytest.mark.parametrize("frozen", [FrozenBatchNorm, SlowFrozenBatchNorm])
def test_frozen_norm_written_out(frozen: type[nn.Module]) -> None:
    """Per-channel arithmetic folds like the norm it spells."""
    model = prepare(nn.Sequential(conv(5), frozen(5), nn.ReLU(), conv(4, 5), frozen(4)))
    for mode in ("tune", "deploy"):
        fast = optimized(model, (IMAGE,), mode)
    assert calls(fast) == ["conv2d", "relu", "conv2d"]


def test_frozen_norm_of_torchvision() -> None:
    declare_missing_ops()  # in case torchvision was built for another torch
    ops = pytest.importorskip("torchvision.ops")
    model = nn.Sequential(conv(5), ops.FrozenBatchNorm2d(5))
    model[1].load_state_dict(FrozenBatchNorm(5).state_dict())
    assert calls(optimized(prepare(model), (IMAGE,), "deploy")) == ["conv2d"]


# -- never foldable -----------------------------------------------------------------------------


@pytest.mark.parametrize("affine", [True, False])
def test_missing_statistics_stay(affine: bool) -> None:
    """Batch statistics in eval mode too: a sample's output depends on its batch."""
    norm = nn.BatchNorm2d(5, affine=affine, track_running_stats=False)
    stays(nn.Sequential(conv(5), norm), IMAGE, because="no running statistics", where="1")


def test_training_norm_stays() -> None:
    model = prepare(nn.Sequential(conv(5), nn.BatchNorm2d(5), nn.ReLU(), conv(4, 5),
                                  nn.BatchNorm2d(4)))  # fmt: skip
    model[1].train()
    for mode in ("tune", "deploy"):
        fast = optimized(model, (IMAGE,), mode)
        assert norms_left(fast) == 1
        assert "training mode" in reasons(fast, "1")


def test_training_norm_before_a_linear_map_stays() -> None:
    """The consumer side has the same precondition."""
    model = prepare(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5)))
    model[0].train()
    fast = optimized(model, ((6, 3),), "deploy")
    assert norms_left(fast) == 1
    assert "batch statistics" in reasons(fast, "0")


def test_norm_of_an_input_stays() -> None:
    stays(nn.BatchNorm2d(4), IMAGE, because="the input")
    right(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4)), IMAGE)


# -- what may stand between the producer and the norm -------------------------------------------


@pytest.mark.parametrize(
    "op",
    [
        nn.Identity(),
        nn.Dropout(0.5),
        nn.Dropout2d(0.5),
        nn.AvgPool2d(2),
        nn.AvgPool2d(3, stride=1, padding=1, count_include_pad=False),
        nn.AdaptiveAvgPool2d((3, 2)),
        nn.AdaptiveAvgPool2d(1),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Upsample(size=(9, 7), mode="bilinear", align_corners=True),
        nn.Upsample(scale_factor=1.5, mode="bicubic"),
        nn.ReflectionPad2d(1),
        nn.ReplicationPad2d((0, 2, 1, 0)),
        nn.CircularPad2d(1),
        nn.BatchNorm2d(4),
        nn.Sequential(nn.Flatten(2), nn.Unflatten(2, (1, 5, 4)), nn.Flatten(2, 3)),
        Lambda(lambda y: y.mean((2, 3), keepdim=True)),
        Lambda(lambda y: y.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)),
        Lambda(lambda y: y.clone()),
        Lambda(lambda y: y * 3),
    ],
    ids=lambda op: str(op).replace("\n", "") if not isinstance(op, Lambda) else None,
)
def test_folds_through(op: nn.Module) -> None:
    """Maps of the spatial axes whose weights add up to one, and reorderings."""
    folds(between(op), IMAGE)


@pytest.mark.parametrize("mode", ["linear", "nearest"])
def test_folds_through_interpolation_of_rank_one(mode: str) -> None:
    up = nn.Upsample(scale_factor=2, mode=mode)
    folds(nn.Sequential(nn.Conv1d(4, 5, 3), up, nn.BatchNorm1d(5)), (2, 4, 7))


def test_folds_through_pixel_shuffle() -> None:
    """Channel c of the norm is r^2 channels of the convolution, each scaled by s[c]."""
    model = nn.Sequential(nn.Conv2d(4, 12, 3), nn.PixelShuffle(2), nn.BatchNorm2d(3))
    folds(model, IMAGE)


def test_folds_through_global_pooling_to_vectors() -> None:
    """conv -> mean over space -> BatchNorm1d on (N, C)."""
    pool = Lambda(lambda y: y.mean((2, 3)))
    folds(nn.Sequential(conv(5), pool, nn.BatchNorm1d(5)), IMAGE)
    model = nn.Sequential(conv(5), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(5))
    folds(model, IMAGE)


@pytest.mark.parametrize(
    ("op", "because"),
    [
        (nn.AvgPool2d(3, stride=1, padding=1), "padded zeros"),
        (nn.AvgPool2d(2, divisor_override=3), "divisor"),
        (nn.MaxPool2d(2), "MaxPool"),
        (nn.ZeroPad2d(1), "pads with a constant"),
        (nn.ConstantPad2d((0, 1, 2, 0), 0.5), "pads with a constant"),
        (nn.ReLU(), "Relu"),
        (nn.PReLU(4), "PRelu"),
        (nn.Sigmoid(), "Sigmoid"),
        (nn.GroupNorm(2, 4), "GroupNorm"),
        (nn.Softmax(1), "Softmax"),
    ],
    ids=lambda value: str(value) if isinstance(value, nn.Module) else "",
)
def test_stays_behind(op: nn.Module, because: str) -> None:
    """Ops that a shift (or a scale of any sign) does not pass."""
    stays(between(op), IMAGE, because=because)


@pytest.mark.parametrize(
    "op",
    [
        nn.AvgPool2d(2, ceil_mode=True),
        nn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False),
        nn.MaxPool2d(3, stride=2, padding=1),
        nn.ChannelShuffle(2),
        nn.LPPool2d(2, 2),
        Lambda(lambda y: y.flip(1)),
        Lambda(lambda y: y.roll(1, 1)),
        Lambda(lambda y: y.roll(1, 2)),
        Lambda(lambda y: y[:, :, 1:, ::2]),
        Lambda(lambda y: y.reshape(y.shape[0], 2, 2, 5, 4).transpose(1, 2).reshape(y.shape)),
        Lambda(lambda y: y.transpose(1, 2)[:, :4]),
        Lambda(lambda y: y * torch.tensor([1.0, -2.0, 0.0, 0.5]).double().reshape(4, 1, 1)),
        Lambda(lambda y: y + 1),
        Lambda(lambda y: 1 - y),
        Lambda(lambda y: -y),
        Lambda(lambda y: y / 3),
        Lambda(lambda y: y.cumsum(2)),
        Lambda(lambda y: y.unsqueeze(1).expand(-1, 1, -1, -1, -1).squeeze(1)),
        Lambda(lambda y: y.sum((2, 3), keepdim=True)),
        Lambda(lambda y: y.mean(2, keepdim=True)),
        Lambda(lambda y: y.masked_fill(y > 1, 0.0)),
        Lambda(lambda y: F.pad(y, (0, 0, 0, 0, 1, 0))[:, :4]),
        Lambda(lambda y: F.pad(y, (-1, 0, 0, -1))),
        Lambda(lambda y: F.interpolate(y, scale_factor=0.6, mode="area")),
        Lambda(lambda y: F.interpolate(y, scale_factor=0.6, mode="bilinear", antialias=True)),
        Lambda(lambda y: torch.cat([y, y], 3)),
        Lambda(lambda y: torch.cat([y[:, 2:], y[:, :2]], 1)),
        Lambda(lambda y: torch.stack([y, -y], 2).flatten(2, 3)),
        Lambda(lambda y: y.float().double()),
        Lambda(lambda y: y.detach()),
        Lambda(lambda y: F.dropout(y, 0.5, training=False, inplace=True)),
    ],
)
def test_is_right_behind(op: nn.Module) -> None:
    """Whether these fold is a matter of effort; that they are right is not."""
    right(between(op), IMAGE)


def test_pixel_unshuffle_is_right() -> None:
    right(nn.Sequential(conv(4), nn.PixelUnshuffle(2), nn.BatchNorm2d(16)), (2, 4, 6, 4))


# -- consumer side: W' = W s, b' = b + W t ------------------------------------------------------


def test_into_linear() -> None:
    fast = folds(nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 5)), (4, 3))
    assert calls(fast) == ["linear"]
    folds(nn.Sequential(nn.BatchNorm1d(3, affine=False), nn.Linear(3, 5, bias=False)), (4, 3))


def test_into_linear_over_a_sequence() -> None:
    """The norm's axis must be the one that the linear map contracts."""
    stays(nn.Sequential(nn.BatchNorm1d(5), nn.Linear(5, 4)), (2, 5, 5), because="not the features")
    swap = Lambda(lambda y: y.transpose(1, 2))
    folds(nn.Sequential(nn.BatchNorm1d(3), swap, nn.Linear(3, 4)), (2, 3, 5))


@pytest.mark.parametrize(
    ("pool", "features"),
    [
        (nn.Identity(), 4 * 7 * 6),
        (nn.AvgPool2d(2), 4 * 3 * 3),
        (nn.AdaptiveAvgPool2d((2, 3)), 4 * 2 * 3),
        (nn.AdaptiveAvgPool2d(1), 4),
        (nn.Dropout(), 4 * 7 * 6),
        (nn.ReflectionPad2d(1), 4 * 9 * 8),
    ],
    ids=str,
)
def test_into_linear_through_flatten(pool: nn.Module, features: int) -> None:
    """Each channel is H W features, each scaled alike."""
    model = nn.Sequential(nn.BatchNorm2d(4), pool, nn.Flatten(), nn.Linear(features, 3))
    assert calls(folds(model, IMAGE)).count("linear") == 1


def test_into_linear_through_means() -> None:
    model = Net(lambda m, x: m.fc(m.bn(x).mean((2, 3))), bn=nn.BatchNorm2d(4), fc=nn.Linear(4, 3))
    folds(model, IMAGE)
    model = Net(lambda m, x: m.fc(m.bn(x).mean(-1).mean(-1)), bn=nn.BatchNorm2d(4),
                fc=nn.Linear(4, 3))  # fmt: skip
    folds(model, IMAGE)


def test_into_linear_over_channels_last() -> None:
    model = Net(lambda m, x: m.fc(m.bn(x).permute(0, 2, 3, 1)), bn=nn.BatchNorm2d(4),
                fc=nn.Linear(4, 3))  # fmt: skip
    folds(model, IMAGE)
    model = Net(lambda m, x: m.fc(m.bn(x).flatten(2).transpose(1, 2)), bn=nn.BatchNorm2d(4),
                fc=nn.Linear(4, 3))  # fmt: skip
    folds(model, IMAGE)


def test_into_linear_of_mixed_features_is_right() -> None:
    """Channels last, then flattened: the features of one channel are not adjacent."""
    model = Net(lambda m, x: m.fc(m.bn(x).permute(0, 2, 3, 1).flatten(1)), bn=nn.BatchNorm2d(4),
                fc=nn.Linear(168, 3))  # fmt: skip
    right(model, IMAGE)


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["dense", "grouped", "depthwise"])
@pytest.mark.parametrize("rank", [1, 2, 3])
def test_into_convolutions(rank: int, groups: int) -> None:
    """Without padding every output sees all of W t."""
    consumer = CONV[rank](4, 8, 2, stride=2, dilation=2, groups=groups, bias=groups != 2)
    fast = folds(nn.Sequential(NORM[rank](4), consumer), (2, 4, *SPATIAL[:rank]))
    assert calls(fast) == [f"conv{rank}d"]


@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_into_convolutions_that_pad_with_pixels(mode: str) -> None:
    """The border is made of normalized pixels, so nothing special happens there."""
    folds(nn.Sequential(nn.BatchNorm2d(4), conv(5, padding=2, padding_mode=mode)), IMAGE)


def test_into_convolution_through_pooling_and_padding() -> None:
    consumer = nn.Conv2d(4, 5, 3)
    folds(nn.Sequential(nn.BatchNorm2d(4), nn.AvgPool2d(2), nn.ReflectionPad2d(1), consumer), IMAGE)
    stays(nn.Sequential(nn.BatchNorm2d(4), nn.ZeroPad2d(1), consumer), IMAGE, because="")
    stays(nn.Sequential(nn.BatchNorm2d(4), nn.MaxPool2d(2), consumer), IMAGE, because="")
    stays(nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), consumer), IMAGE, because="", where="0")


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1, "stride": 2},
        {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False},
        {"kernel_size": 3, "padding": 2, "stride": 2, "dilation": 2},
        {"kernel_size": (3, 1), "padding": (1, 0), "groups": 2},
        {"kernel_size": 3, "padding": 1, "groups": 4},
        {"kernel_size": 3, "padding": "same"},
        {"kernel_size": 2, "padding": "same"},
        {"kernel_size": 5, "padding": 4, "stride": 3},
    ],
    ids=str,
)
def test_into_zero_padded_convolutions_with_a_bias_map(options: dict[str, object]) -> None:
    """The border sees less of W t: one map over the outputs, stored, is added to each."""
    fast = folds(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, **options)), IMAGE)
    assert calls(fast) == ["conv2d", "add"]


@pytest.mark.parametrize("rank", [1, 3])
def test_bias_maps_of_other_ranks(rank: int) -> None:
    consumer = CONV[rank](4, 4, 3, padding=1, stride=2)
    fast = folds(nn.Sequential(NORM[rank](4), consumer), (2, 4, *SPATIAL[:rank]))
    assert calls(fast) == [f"conv{rank}d", "add"]


def test_bias_map_of_an_image_smaller_than_the_kernel() -> None:
    folds(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 5, padding=2)), (2, 4, 2, 3))


def test_bias_map_is_declined_where_it_costs_more_than_the_norm() -> None:
    """A map over 16 channels, added, moves more memory than a norm over 4."""
    stays(nn.Sequential(nn.BatchNorm2d(4), conv(16)), IMAGE, because="costs more", where="0")


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 3, "stride": 2, "dilation": 2, "bias": False},
        {"kernel_size": 2, "stride": (1, 2), "groups": 2},
    ],
    ids=str,
)
def test_into_transposed_convolutions(options: dict[str, object]) -> None:
    """Output phases and borders see different taps, even without padding: always a map."""
    out = 2
    model = nn.Sequential(nn.BatchNorm2d(8 * out), nn.ConvTranspose2d(8 * out, out, **options))
    fast = folds(model, (2, 8 * out, 4, 5))
    assert calls(fast) == ["conv_transpose2d", "add"]


def test_transposed_convolution_that_grows_declines() -> None:
    model = nn.Sequential(nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 2, stride=2))
    stays(model, IMAGE, because="costs more")


def test_bias_map_needs_a_static_image() -> None:
    """With a dynamic image the map has no size; without padding the fold needs none."""
    size = {0: torch.export.Dim.AUTO, 2: torch.export.Dim.AUTO, 3: torch.export.Dim.AUTO}
    model = prepare(nn.Sequential(nn.BatchNorm2d(4), conv(3, stride=2)))
    fast = optimized(model, (IMAGE,), "deploy", dynamic_shapes=(size,))
    assert norms_left(fast) == 1
    assert "dynamic" in reasons(fast, "0")
    wide = tensor(2, 4, 9, 12)
    assert_equal(fast(wide), output_of(model, (wide,)))
    model = prepare(nn.Sequential(nn.BatchNorm2d(4), nn.Conv2d(4, 8, 3), nn.BatchNorm2d(8)))
    fast = optimized(model, (IMAGE,), "deploy", dynamic_shapes=(size,))
    assert norms_left(fast) == 0
    assert_equal(fast(wide), output_of(model, (wide,)))


def test_norm_read_by_two_maps_goes_into_both() -> None:
    model = Net(lambda m, x: m.a(m.bn(x)) + m.b(m.bn(x)), bn=nn.BatchNorm2d(4),
                a=nn.Conv2d(4, 3, 1), b=nn.Conv2d(4, 3, 1, groups=1))  # fmt: skip
    folds(model, IMAGE)
    model = Net(lambda m, x: (m.a(y := m.bn(x)), m.b(y.flatten(1))), bn=nn.BatchNorm2d(4),
                a=nn.Conv2d(4, 3, 1), b=nn.Linear(168, 2))  # fmt: skip
    folds(model, IMAGE)


def test_norm_with_a_reader_that_cannot_take_it_stays() -> None:
    model = Net(lambda m, x: m.a(m.bn(x)) + torch.tanh(m.bn(x)), bn=nn.BatchNorm2d(4),
                a=nn.Conv2d(4, 4, 1))  # fmt: skip
    stays(model, IMAGE, because="also read by Tanh", where="bn")
    model = Net(lambda m, x: (m.a(m.bn(x)), m.bn(x)), bn=nn.BatchNorm2d(4), a=nn.Conv2d(4, 4, 1))
    stays(model, IMAGE, because="also read by", where="bn")


def test_producer_comes_first() -> None:
    """Between two convolutions the norm goes into the one before: no bias map is needed."""
    fast = folds(nn.Sequential(conv(), nn.BatchNorm2d(4), conv(stride=2)), IMAGE)
    assert calls(fast) == ["conv2d", "conv2d"]


# -- the shape of the graph ---------------------------------------------------------------------


def test_norm_of_norm() -> None:
    """s = s2 s1, t = s2 t1 + t2, at both ends of a model."""
    fast = folds(nn.Sequential(conv(), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)), IMAGE)
    assert calls(fast) == ["conv2d"]
    folds(nn.Sequential(nn.BatchNorm2d(4), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 2)), IMAGE)


@pytest.mark.parametrize("sign", [1, -1], ids=["sum", "difference"])
def test_sums_share_one_shift(sign: int) -> None:
    """s goes into both terms, t into one."""
    modules = {"a": conv(), "b": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4)}
    folds(Net(lambda m, x, y: m.bn(m.a(x) + sign * m.b(y)), **modules), IMAGE, IMAGE)
    folds(Net(lambda m, x, y: m.bn(m.a(x) - m.b(y)), **modules), IMAGE, IMAGE)


@pytest.mark.parametrize("shape", [(1, 4, 7, 6), (4, 1, 1), (1, 4, 1, 6), (1,), (7, 6)], ids=str)
def test_sums_with_a_parameter(shape: tuple[int, ...]) -> None:
    """A position embedding is scaled; a bias is a shift."""
    for body in (lambda m, x: m.bn(m.a(x) + m.p), lambda m, x: m.bn(m.p - m.a(x))):
        modules = {"a": conv(), "bn": nn.BatchNorm2d(4), "p": nn.Parameter(tensor(*shape))}
        folds(Net(body, **modules), IMAGE)


def test_sums_with_something_that_takes_no_scale_stay() -> None:
    modules = {"a": conv(), "bn": nn.BatchNorm2d(4)}
    stays(Net(lambda m, x, y: m.bn(m.a(x) + y), **modules), IMAGE, IMAGE, because="the input")
    stays(Net(lambda m, x: m.bn(m.a(x) + x.relu()), **modules), IMAGE, because="Relu")


def test_sums_that_broadcast_are_right() -> None:
    """One term lacks the channel axis: scaling it by s would give it one."""
    modules = {"a": conv(), "b": conv(1), "bn": nn.BatchNorm2d(4)}
    right(Net(lambda m, x: m.bn(m.a(x) + m.b(x)), **modules), IMAGE)
    right(Net(lambda m, x: m.bn(m.b(x) - m.a(x)), **modules), IMAGE)
    modules["b"] = nn.Conv2d(4, 4, (7, 6))
    right(Net(lambda m, x: m.bn(m.a(x) + m.b(x)), **modules), IMAGE)
    right(Net(lambda m, x: m.bn(m.b(x) + m.a(x)), **modules), IMAGE)


def test_a_value_added_to_itself() -> None:
    modules = {"a": conv(), "bn": nn.BatchNorm2d(4)}
    folds(Net(lambda m, x: m.bn((y := m.a(x)) + y), **modules), IMAGE)
    right(Net(lambda m, x: m.bn((y := m.a(x)) - y), **modules), IMAGE)
    right(Net(lambda m, x: m.bn((y := m.a(x)) * y), **modules), IMAGE)
    right(Net(lambda m, x: m.bn(torch.add(y := m.a(x), y, alpha=-3)), **modules), IMAGE)


def test_concatenations_share_out_the_channels() -> None:
    """Every piece takes its slice of s and t."""
    modules = {"a": conv(2), "b": conv(3), "bn": nn.BatchNorm2d(5)}
    folds(Net(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 1)), **modules), IMAGE)
    folds(Net(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], -3)), **modules), IMAGE)
    nested = {"c": conv(3), **modules}
    folds(Net(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x) + m.c(x)], 1)), **nested), IMAGE)


def test_concatenations_along_another_axis() -> None:
    modules = {"a": conv(5), "b": conv(5), "bn": nn.BatchNorm2d(5)}
    folds(Net(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 2)), **modules), IMAGE)
    folds(Net(lambda m, x: m.bn(torch.cat([m.a(x), m.b(x)], 0)), **modules), IMAGE)


def test_concatenation_with_something_that_takes_no_scale_stays() -> None:
    modules = {"a": conv(2), "bn": nn.BatchNorm2d(6)}
    stays(Net(lambda m, x: m.bn(torch.cat([m.a(x), x], 1)), **modules), IMAGE, because="the input")
    modules = {"a": conv(2), "bn": nn.BatchNorm2d(4)}
    model = Net(lambda m, x: m.bn(torch.cat([y := m.a(x), y], 1)), **modules)
    right(model, IMAGE)


def test_convolution_with_other_readers_stays() -> None:
    modules = {"a": conv(), "bn": nn.BatchNorm2d(4)}
    stays(
        Net(lambda m, x: m.bn(y := m.a(x)) + y.tanh(), **modules), IMAGE, because="used elsewhere"
    )
    stays(Net(lambda m, x: (m.bn(y := m.a(x)), y), **modules), IMAGE, because="used elsewhere")


def test_declining_deep_inside_leaves_nothing_behind() -> None:
    """The first piece could take its share, the second cannot: the graph stays as it was."""
    modules = {"a": conv(2), "b": conv(2), "bn": nn.BatchNorm2d(4)}
    model = Net(lambda m, x, y: m.bn(torch.cat([m.a(x), m.b(y).relu()], 1)), **modules)
    fast = stays(model, IMAGE, IMAGE, because="Relu")
    assert calls(fast) == ["conv2d", "conv2d", "relu", "cat", "batch_norm"]


def test_shared_convolution_gets_a_weight_for_each_norm() -> None:
    modules = {"a": conv(), "bn1": nn.BatchNorm2d(4), "bn2": nn.BatchNorm2d(4)}
    fast = folds(Net(lambda m, x, y: m.bn1(m.a(x)) + m.bn2(m.a(y)), **modules), IMAGE, IMAGE)
    assert len({id(one) for one in fast.parameters() if one.ndim == 4}) == 2


def test_shared_pair_keeps_one_weight() -> None:
    """The same convolution with the same norm at every site is still one convolution."""
    modules = {"a": conv(), "bn": nn.BatchNorm2d(4)}
    fast = folds(Net(lambda m, x, y: m.bn(m.a(x)) * m.bn(m.a(y)), **modules), IMAGE, IMAGE)
    assert [one.ndim for one in fast.parameters()].count(4) == 1


def test_shared_norm_goes_into_every_convolution() -> None:
    modules = {"a": conv(), "b": conv(), "bn": nn.BatchNorm2d(4)}
    folds(Net(lambda m, x: m.bn(m.a(x)).relu() + m.bn(m.b(x)), **modules), IMAGE)


def test_convolution_whose_weight_is_used_elsewhere() -> None:
    """Parameters are values: scaling a use of a weight leaves its other uses alone."""
    modules = {"a": conv(), "bn": nn.BatchNorm2d(4)}
    folds(Net(lambda m, x: m.bn(m.a(x)) + m.a.weight.sum() * m.bn.weight.sum(), **modules), IMAGE)


# -- what becomes of the parameters -------------------------------------------------------------


def block() -> nn.Module:
    return nn.Sequential(conv(5, bias=False), nn.BatchNorm2d(5), nn.ReLU(), conv(3, 5),
                         nn.BatchNorm2d(3))  # fmt: skip


def test_tune_keeps_names_and_values() -> None:
    model = prepare(block())
    fast = optimized(model, (IMAGE,), "tune")
    source = dict(model.named_parameters())
    assert [name for name, _ in fast.named_parameters()] == list(source)
    for name, one in fast.named_parameters():
        assert torch.equal(one, source[name])
        assert one.requires_grad == source[name].requires_grad
    assert all(torch.equal(fast.state_dict()[n], t) for n, t in model.state_dict().items())


def test_deploy_stores_the_folded_weights_under_the_convolutions_names() -> None:
    model = prepare(block())
    fast = optimized(model, (IMAGE,), "deploy")
    found = fast.state_dict()
    assert sorted(found) == ["0.bias", "0.weight", "3.bias", "3.weight"]
    scale = model[1].weight / (model[1].running_var + model[1].eps).sqrt()
    assert_equal(found["0.weight"], model[0].weight * scale[:, None, None, None])
    assert_equal(found["0.bias"], model[1].bias - model[1].running_mean * scale)


def test_training_in_tune_mode_is_training_in_eval_mode() -> None:
    """Ten SGD steps agree; in Deploy form they lead elsewhere, which is why Tune exists."""
    model, x, target = prepare(block()), tensor(*IMAGE), tensor(2, 3, 7, 6, seed=2)

    def trained(module: nn.Module) -> Tensor:
        optimizer = torch.optim.SGD(module.parameters(), lr=0.02, momentum=0.9)
        for _ in range(10):
            optimizer.zero_grad()
            F.mse_loss(module(x), target).backward()
            optimizer.step()
        return output_of(module, (x,))

    tune = trained(graphopt.optimize(model, (x,), mode="tune"))
    deploy = trained(graphopt.optimize(model, (x,), mode="deploy"))
    source = trained(model)
    assert relative_error(tune, source) <= 1e-10
    assert relative_error(deploy, source) > 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("mode", ["tune", "deploy"])
def test_narrow_dtypes(mode: str, dtype: torch.dtype) -> None:
    """The fold keeps dtypes, and is about as near to the float64 truth as the model itself: what it
    adds is the rounding of the folded weights."""
    model = prepare(block())
    x = tensor(*IMAGE).to(dtype)
    truth = output_of(model.to(dtype).double(), (x.double(),))
    model.to(dtype)
    fast = graphopt.optimize(model, (x,), mode=mode)
    assert norms_left(fast) == 0
    assert {one.dtype for one in fast.parameters()} == {dtype}
    assert fast(x).dtype == dtype
    own = relative_error(output_of(model, (x,)).double(), truth)
    assert relative_error(output_of(fast, (x,)).double(), truth) <= 2 * own + torch.finfo(dtype).eps


# -- what the graph looks like ------------------------------------------------------------------


def printed(model: nn.Module, x: Tensor, *passes: graphopt.Pass) -> str:
    """The graph after the passes; dynamic sizes, whose names torch makes up, read N."""
    graph = capture(prepare(model), (x,)).graph
    for one in passes:
        one.run(Session(graph))
    return re.sub(r"\bs\d+\b", "N", str(graph))


def golden(text: str) -> str:
    return textwrap.dedent(text).strip()


class Pair(nn.Module):
    """conv -> norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, bias=False)
        self.bn = nn.BatchNorm2d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x))


class Head(nn.Module):
    """norm -> flatten -> linear."""

    def __init__(self) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(4)
        self.fc = nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.bn(x).flatten(1))


def test_golden_producer_side() -> None:
    """Captured; in Tune form, where the fold is a formula of the parameters; in Deploy form, where
    the formula is a stored value."""
    x = tensor(2, 3, 9, 9)
    captured = golden("""
        graph(x: f64[N, 3, 9, 9])
          conv2d: f64[N, 8, 4, 4] = Conv(x, @conv.weight, None, stride=(2, 2), padding=(0, 0), dilation=(1, 1))  # conv
          batch_norm: f64[N, 8, 4, 4] = BatchNorm(conv2d, @bn.weight, @bn.bias, @bn.running_mean, @bn.running_var, training=False, momentum=0.1, eps=1e-05)  # bn
          return batch_norm
    """)  # noqa: E501
    tune = golden("""
        graph(x: f64[N, 3, 9, 9])
          add_tensor: f64[8] = Add(@bn.running_var, right=1e-05)  # bn
          rsqrt_default: f64[8] = Rsqrt(add_tensor)  # bn
          mul_tensor: f64[8] = Mul(@bn.weight, rsqrt_default)  # bn
          mul_tensor_1: f64[8] = Mul(@bn.running_mean, mul_tensor)  # bn
          sub_tensor: f64[8] = Sub(@bn.bias, mul_tensor_1)  # bn
          reshape_default: f64[8, 1, 1, 1] = Reshape(mul_tensor, shape=(8, 1, 1, 1))  # bn
          mul_tensor_2: f64[8, 3, 3, 3] = Mul(@conv.weight, reshape_default)  # bn
          conv2d_1: f64[N, 8, 4, 4] = Conv(x, mul_tensor_2, sub_tensor, stride=(2, 2), padding=(0, 0), dilation=(1, 1))  # conv
          return conv2d_1
    """)  # noqa: E501
    deploy = golden("""
        graph(x: f64[N, 3, 9, 9])
          conv2d_1: f64[N, 8, 4, 4] = Conv(x, @conv.weight, @conv.bias, stride=(2, 2), padding=(0, 0), dilation=(1, 1))  # conv
          return conv2d_1
    """)  # noqa: E501
    assert printed(Pair(), x) == captured
    assert printed(Pair(), x, FoldBatchNorm()) == tune
    assert printed(Pair(), x, FoldBatchNorm(), Materialize()) == deploy


def test_golden_consumer_side() -> None:
    """Four channels of three pixels are twelve features: the scale is repeated for each."""
    x = tensor(2, 4, 3)
    captured = golden("""
        graph(x: f64[N, 4, 3])
          batch_norm: f64[N, 4, 3] = BatchNorm(x, @bn.weight, @bn.bias, @bn.running_mean, @bn.running_var, training=False, momentum=0.1, eps=1e-05)  # bn
          flatten: f64[N, 12] = Reshape(batch_norm, shape=(N, 12))
          linear: f64[N, 2] = Linear(flatten, @fc.weight, @fc.bias)  # fc
          return linear
    """)  # noqa: E501
    tune = golden("""
        graph(x: f64[N, 4, 3])
          add_tensor_1: f64[4] = Add(@bn.running_var, right=1e-05)  # fc
          rsqrt_default_1: f64[4] = Rsqrt(add_tensor_1)  # fc
          mul_tensor_2: f64[4] = Mul(@bn.weight, rsqrt_default_1)  # fc
          mul_tensor_3: f64[4] = Mul(@bn.running_mean, mul_tensor_2)  # fc
          sub_tensor_1: f64[4] = Sub(@bn.bias, mul_tensor_3)  # fc
          repeat_interleave_self_int: f64[12] = RepeatInterleave(mul_tensor_2, repeats=3, dim=0)  # fc
          repeat_interleave_self_int_1: f64[12] = RepeatInterleave(sub_tensor_1, repeats=3, dim=0)  # fc
          flatten_1: f64[N, 12] = Reshape(x, shape=(-1, 12))
          mul_tensor_4: f64[2, 12] = Mul(@fc.weight, repeat_interleave_self_int_1)  # fc
          sum_dim_int_list: f64[2] = Sum(mul_tensor_4, dims=(1,))  # fc
          add_tensor_2: f64[2] = Add(@fc.bias, sum_dim_int_list)  # fc
          mul_tensor_5: f64[2, 12] = Mul(@fc.weight, repeat_interleave_self_int)  # fc
          linear_1: f64[N, 2] = Linear(flatten_1, mul_tensor_5, add_tensor_2)  # fc
          return linear_1
    """)
    deploy = golden("""
        graph(x: f64[N, 4, 3])
          flatten_1: f64[N, 12] = Reshape(x, shape=(-1, 12))
          linear_1: f64[N, 2] = Linear(flatten_1, @fc.weight, @fc.bias)  # fc
          return linear_1
    """)
    assert printed(Head(), x) == captured
    assert printed(Head(), x, FoldBatchNorm()) == tune
    assert printed(Head(), x, FoldBatchNorm(), Materialize()) == deploy


def test_a_factor_does_not_pass_a_padding_with_a_constant():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.factor = nn.Conv1d(2, 3, 1), nn.Parameter(torch.randn(3, 1))

        def forward(self, x):
            return F.pad(self.conv(x), (1, 1), value=0.5) * self.factor

    model, x = Padded().double(), torch.randn(2, 2, 5, dtype=torch.float64)
    fast = graphopt.optimize(model, (x,))
    assert any("pads with a constant" in one.reason for one in fast.report.refused)
    torch.testing.assert_close(fast(x), model(x))
