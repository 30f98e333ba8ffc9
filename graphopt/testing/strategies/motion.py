"""Statements of a free-form program: views, movement, indexing, padding, writes in place."""

from __future__ import annotations

from graphopt.testing.strategies.sketch import MOST, Sketch, statement

ALONG = (
    "{x}.flip({d})", "torch.flip({x}, dims=[{d}])", "torch.roll({x}, 1, {d})",
    "{x}.roll(shifts=-1, dims={d})", "{x}.unsqueeze({d})", "torch.stack([{x}, -{x}], dim={d})",
    "torch.cat([{x}, {x}], {d})", "torch.cat((2 * {x},), dim={d})", "{x}.select({d}, 0)",
    "{x}.select({d}, -1)", "{x}.narrow({d}, 0, 1)", "{x}.index_select({d}, torch.tensor([0, 0]))",
    "torch.unbind({x}, {d})[-1]", "{x}.repeat_interleave(2, dim={d})",
    "torch.gather({x}, {d}, torch.zeros_like({x}, dtype=torch.int64))", "{x}.split(1, dim={d})[0]",
    "sum({x}.split(1, {d}))", "torch.cat({x}.chunk(2, dim={d})[::-1], {d})", "sum({x}.unbind({d}))",
    "torch.cat([one.tanh() for one in torch.split({x}, 2, {d})], dim={d})", "{x}.argsort({d})",
    "torch.take_along_dim({x}, {x}.argsort({d}), {d})", "{x}.unfold({d}, 1, 1)", "{x}.squeeze({d})",
    "torch.index_add({x}, {d}, torch.tensor([0]), {x}.narrow({d}, 0, 1))", "{x}.movedim({d}, -1)",
    "torch.cat([{x}, torch.zeros_like({x})], {d})", "{x}.transpose({d}, -1)",
    "{x}.swapaxes({d}, -1)",
    "torch.scatter({x}, {d}, torch.zeros_like({x}, dtype=torch.int64)[:1], 0.25)",
    "{x}.tensor_split(2, {d})[0]",
)  # fmt: skip
INDEXED = (
    "{x}[..., ::2]", "{x}[:, 1:]", "{x}[:, :-1]", "{x}[..., -1]", "{x}[:, 0]", "{x}[..., None]",
    "{x}[:, None]", "{x}[..., 1::2]", "{x}[:, [0, 0]]", "{x}[:, torch.tensor([0])]",
    "{x}[..., -2:]", "{x}[:, ::3]", "{x}[..., 0:1]", "{x}[:, 0:0:1, ...].sum() + {x}",
    "{x}[..., :100]", "{x}[:, -1:] * 2", "{x}[0]", "{x}[:1]", "{x}[...]",
)  # fmt: skip
RESHAPED = (
    "{x}.flatten(1)", "{x}.flatten(-2)", "{x}.reshape({x}.shape[0], -1)",
    "{x}.view({x}.size(0), -1)", "{x}.mT", "{x}.reshape({x}.shape)",
    "{x}.flatten(1).unflatten(1, {x}.shape[1:])", "{x}.permute(*range({x}.ndim))", "{x}.t()",
    "{x}.permute(0, *range({x}.ndim - 1, 0, -1))", "{x}.transpose(1, -1).transpose(1, -1)",
    "{x}.unsqueeze(0).squeeze(0)", "{x}.reshape({x}.shape[0], -1).reshape({x}.shape)",
    "{x}.transpose(-1, -2).contiguous()", "{x}.flatten()", "{x}.T",
    "{x}.unsqueeze(1).expand(-1, 3, *{x}.shape[1:])", "{x}.expand_as({x})",
    "{x}.repeat(1, *[2] * ({x}.ndim - 1))", "{x}.tile((2,))", "{x}.transpose(0, 1)",
    "{x}.movedim(1, -1)", "{x}.squeeze()", "{x}.ravel()", "{x}.view_as({x})",
    "{x}.permute(0, 2, 3, 1)", "{x}.permute(0, 3, 1, 2)", "{x}.movedim(1, -1).movedim(-1, 1)",
    "{x}.rot90(1, (-2, -1))", "{x}.unsqueeze(-1).expand(*{x}.shape, 2)",
    "torch.pixel_shuffle({x}.repeat(1, 4, 1, 1), 2)", "{x}.adjoint()", "F.pixel_unshuffle({x}, 2)",
    "F.channel_shuffle({x}, 2)", "torch.atleast_3d({x})",
    "{x}.transpose(1, 2).reshape({x}.shape[0], -1)", "F.unfold({x}, 2)",
    "torch.broadcast_to({x}, (2, *{x}.shape))", "{x}.reshape(-1)", "{x}.swapdims(0, 1)",
    "torch.hstack([{x}, {x}])",
)  # fmt: skip
PADDED = (
    "F.pad({x}, (1, 1))", "F.pad({x}, (0, 1), value=0.5)", "F.pad({x}, (1, 0, 0, 1))",
    "F.pad({x}, (0, 0))", "F.pad({x}, (1, 1), mode='reflect')",
    "F.pad({x}, (1, 1, 1, 1), mode='replicate')", "F.pad({x}, (-1, 0))",
    "F.pad({x}, (1, 0, 1, 0), 'circular')", "F.pad({x}, (1, 2), mode='replicate')",
    "torch.constant_pad_nd({x}, (0, 2), 1.0)", "F.interpolate({x}, scale_factor=2)",
    "F.interpolate({x}, size=(3, 3), mode='bilinear')",
    "F.interpolate({x}, scale_factor=2.0, mode='bicubic', align_corners=True)",
    "F.interpolate({x}, 4, mode='area')", "F.avg_pool2d({x}, 2)", "F.avg_pool1d({x}, 2, 1)",
    "F.max_pool2d({x}, 2, 1)", "F.max_pool1d({x}, 2)",
    "F.avg_pool2d({x}, 3, 1, 1, count_include_pad=False)", "F.adaptive_avg_pool2d({x}, 2)",
    "F.lp_pool2d({x}, 2, 2)", "F.adaptive_max_pool2d({x}, 1)",
    "F.avg_pool2d({x}, 2, ceil_mode=True)", "F.adaptive_avg_pool1d({x}, 1)",
    "F.max_pool2d({x}, 3, stride=2, padding=1, return_indices=True)[0]",
    "F.local_response_norm({x}, 2)", "F.adaptive_avg_pool2d({x}, (None, 1))",
    "F.avg_pool3d({x}, 2, 1)", "F.max_pool3d({x}, 2, 1)", "F.adaptive_avg_pool3d({x}, 1)",
    "F.grid_sample({x}, F.affine_grid(self.theta.expand({x}.shape[0], 2, 3), {x}.shape))",
)  # fmt: skip
WRITES = (
    "{y}.relu_()", "{y}.mul_(0.5)", "{y}.add_(1)", "{y}.sub_({y})", "{y}.tanh_()", "{y}.neg_()",
    "{y}.clamp_(-1, 1)", "{y}[:, 0] = 0.5", "{y}[..., ::2] += 1", "{y}[:, 1:] *= 2",
    "{y}[..., -1] = {y}[..., 0]", "{y}[:, :1].zero_()", "{y} += 1", "{y} *= {y}", "{y} -= 0.25",
    "{y}.select(1, 0).add_(1)", "{y}.transpose(0, 1)[0].mul_(2)", "{y}.t_()",
    "{y}.view(-1)[0] = 0.75", "{y}.unsqueeze(1).mul_(0.5)", "{y}.narrow(1, 0, 1).fill_(0.3)",
    "{y}.copy_({y}.flip(1))", "{y}.masked_fill_({y} > 1e3, 0.0)",
    "{y}.index_fill_(1, torch.tensor([0]), 1.0)", "{y}.sigmoid_()", "{y}.flatten(1)[:, 0] = 1",
    "F.relu({y}, inplace=True)", "F.silu({y}, inplace=True)",
    "F.dropout({y}, 0.5, training=False, inplace=True)", "torch.add({y}, 1, out={y})",
    "torch.mul({y}, 0.5, out={y})", "{y}.addcmul_({y}, {y}, value=0.1)", "{y}.zero_()",
    "{y}.chunk(2, dim=1)[0].mul_(3)", "{y}.unbind(1)[-1].add_(0.5)",
    "{y}[:, 0], {y}[:, -1] = {y}[:, -1] + 0, {y}[:, 0] + 0", "{y}.diagonal(0, -2, -1).add_(1)",
    "{y}.mT.mul_(0.5)", "{y}.index_add_(1, torch.tensor([0]), {y}[:, :1])", "{y}.squeeze_()",
    "{y}.lerp_({y} * {y}, 0.5)", "{y}[{y} < -1e3] = 0",
    "{y}.permute(*range({y}.ndim))[..., 0] = 0.1", "{y}.expand_as({y}).mul_(2)",
)  # fmt: skip


@statement
def along(s: Sketch) -> object:
    """Movement along one axis."""
    form = s.choose(ALONG)
    x = s.pick()
    axis = None if x is None else s.axis(x)
    if x is None or axis is None or ("argsort" in form and not _distinct(s, x, axis)):
        return None
    return s.let(form.format(x=x, d=axis))


def _distinct(s: Sketch, x: str, axis: int) -> bool:
    """Whether rounding cannot change an order."""
    sorted_ = s.value(x).sort(axis).values
    return s.shape(x)[axis] == 1 or bool((sorted_.diff(dim=axis) > 1e-6).all())


@statement
def indexed(s: Sketch) -> object:
    x = s.pick(floating=s.flag())
    return x and s.let(s.choose(INDEXED).format(x=x))


@statement
def reshaped(s: Sketch) -> object:
    x = s.pick(floating=s.flag())
    return x and s.let(s.choose(RESHAPED).format(x=x))


@statement
def padded(s: Sketch) -> object:
    """Padding, pooling and interpolation; most need an image."""
    form = s.choose(PADDED)
    x = s.pick(lambda one: len(s.shape(one)) >= 3)
    if x is not None and "theta" in form and not hasattr(s.module, "theta"):
        s.module.register_buffer("theta", s.random(1, 2, 3))
    return x and s.let(form.format(x=x))


@statement
def joined(s: Sketch) -> object:
    """Two values of one shape, stacked or side by side."""
    x = s.pick(lambda one: s.value(one).numel() <= MOST // 2)
    if x is None:
        return None
    y = s.pick(lambda one: s.shape(one) == s.shape(x))
    axis = s.axis(x)
    if axis is None:
        return None
    form = s.choose(
        ["torch.cat([{x}, {y}], dim={d})", "torch.stack(({x}, {y}), {d})",
         "torch.cat([{y}, {x}, {y}], {d})",
         "torch.concat([{x}, {y}.relu()], axis={d})", "torch.stack([{x}, {y}], {d}).sum({d})",
         "torch.cat([{x}, {y}], {d}).chunk(2, {d})[1]",
         "torch.cat([{x}, {y}], {d}).narrow({d}, 0, 1)"]
    )  # fmt: skip
    return s.let(form.format(x=x, y=y, d=axis))


@statement
def write(s: Sketch) -> object:
    """In place: on a copy, on a view of a copy, on a fresh value, now and then on what there is."""
    form = s.choose(WRITES)
    x = s.pick()
    if x is None:
        return None
    kind = s.choose(["copy", "copy", "view", "arithmetic", "itself"])
    if kind == "itself" and x.startswith("v"):
        return s.run(form.format(y=x))
    y = s.let({"view": f"({x} * 1)[:, :]", "arithmetic": f"{x} + 0.5"}.get(kind, f"{x}.clone()"))
    if y is None:
        return None
    views = ("{y}[:]", "{y}.view(-1)", "{y}.unsqueeze(0)", "{y}.transpose(0, 1)")
    view = s.let(s.choose(views).format(y=y)) if s.flag() else None
    done = s.run(form.format(y=y))
    return done and view and s.let(f"{view} * 2")


@statement
def write_to_an_input(s: Sketch) -> object:
    if s.number(0, 5) < 5:
        return None
    return s.run(
        s.choose(["{x}.mul_(0.5)", "{x}[:, 0] = 1.0", "{x} += 1", "{x}.relu_()"]).format(x="x0")
    )


@statement
def out(s: Sketch) -> object:
    """`out=` into fresh memory; autograd refuses it where a parameter has a part in the result."""
    x = s.pick(None if s.number(0, 7) == 7 else lambda one: one.startswith("x"))
    if x is None:
        return None
    buffer = s.let(f"torch.zeros_like({x})")
    form = s.choose(
        ["torch.add({x}, {x}, out={b})", "torch.mul({x}, 2, out={b})",
         "torch.sub({x}, 1, out={b}[:])",
         "torch.sigmoid({x}, out={b})"]
    )  # fmt: skip
    return buffer and s.run(form.format(x=x, b=buffer))
