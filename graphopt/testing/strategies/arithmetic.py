"""Statements of a free-form program: elementwise arithmetic, reductions, products, comparisons."""

from __future__ import annotations

import torch

from graphopt.testing.strategies.sketch import MOST, Sketch, statement

UNARY = (
    "torch.relu({x})", "F.relu({x}, inplace=False)", "{x}.sigmoid()", "torch.tanh({x})",
    "F.gelu({x})", "F.gelu({x}, approximate='tanh')", "F.silu({x})", "F.elu({x}, alpha=0.7)",
    "F.mish({x})", "F.softplus({x}, beta=2)", "F.hardswish({x})", "F.hardsigmoid({x})",
    "F.relu6({x})", "F.leaky_relu({x}, negative_slope=0.2)", "F.hardtanh({x}, -0.7, 1.3)",
    "F.selu({x})", "F.celu({x})", "F.softsign({x})", "F.logsigmoid({x})", "F.tanhshrink({x})",
    "F.softshrink({x})", "{x}.abs()", "-{x}", "-(-{x})", "torch.neg({x})",
    "torch.relu(torch.relu({x}))", "{x}.sin()", "{x}.cos()", "torch.atan({x})", "torch.asinh({x})",
    "torch.erf({x})", "torch.square({x})", "torch.exp({x}.clamp(-3, 2))", "torch.expm1({x} / 8)",
    "torch.log1p({x}.abs())", "({x}.abs() + 0.1).log()", "({x}.abs() + 0.1).sqrt()",
    "torch.rsqrt({x} ** 2 + 0.5)", "({x} * {x} + 0.5).reciprocal()", "{x}.clamp(min=-0.4)",
    "{x}.clamp(max=0.6)", "torch.clamp({x}, -0.5, 0.5)", "torch.clip({x}, max=0.9)",
    "torch.clamp_min({x}, -1)", "torch.lgamma({x}.abs() + 1)", "torch.sinc({x})",
    "{x}.nan_to_num()", "{x}.clone()", "{x}.contiguous()", "{x}.detach()", "{x}.double()",
    "{x}.to(torch.float64)", "torch.asin({x}.tanh())", "F.dropout({x}, 0.5, training=False)",
    "F.dropout({x}, p=0.3, training=self.training)", "torch.erfinv({x}.tanh() * 0.9)",
    "torch.log2({x}.abs() + 1)", "torch.exp2({x}.tanh())", "torch.frac({x}.tanh())",
    "torch.logit({x}.sigmoid())", "torch.deg2rad({x})", "+{x}", "F.rrelu({x}, training=False)",
    "{x}.type_as({x})", "torch.xlogy({x}, {x}.abs() + 1)",
)  # fmt: skip
SCALAR = (
    "{x} * 1", "1.0 * {x}", "{x} / 1", "{x} ** 1", "{x} + 0", "0.0 + {x}", "{x} - 0", "{x} * 2",
    "0.5 * {x}", "{x} / 3", "{x} + 1", "2.5 + {x}", "{x} - 0.5", "1 - {x}", "{x} ** 2", "{x} ** 3",
    "{x}.pow(2.0)", "({x}.abs() + 0.2) ** 0.5", "({x}.abs() + 0.2) ** -1", "1 / ({x}.abs() + 1)",
    "torch.add({x}, 1, alpha=2)", "torch.sub({x}, 3, alpha=0.5)", "torch.rsub({x}, 2)",
    "{x} * True", "{x} + torch.tensor(0.25)", "torch.tensor([2.0]) * {x}", "{x} * torch.ones(1)",
    "{x} * 1 + 0", "{x} + torch.zeros_like({x})", "torch.div({x}, 2.0)", "{x}.mul(3).mul(0.25)",
    "{x}.add(1).add(2)", "torch.full_like({x}, 0.75) * {x}", "{x} * math.pi", "0 * {x} + 1",
    "{x} * 0", "2 ** {x}.tanh()", "torch.true_divide({x}, 4)", "{x}.sub(1).sub(1)", "{x} * -1",
    "torch.addcmul({x}, {x}, {x}, value=0.1)", "torch.lerp({x}, {x}.tanh(), 0.3)",
    "torch.special.xlog1py({x}, {x}.abs())",
)  # fmt: skip
BINARY = (
    "{x} + {y}", "{x} - {y}", "{x} * {y}", "{x} / ({y}.abs() + 0.5)",
    "torch.add({x}, {y}, alpha=2)", "torch.sub({x}, other={y}, alpha=0.5)",
    "torch.maximum({x}, {y})", "torch.minimum({x}, {y})", "torch.hypot({x}, {y} + 2)",
    "torch.atan2({x}, {y}.abs() + 0.5)", "torch.rsub({x}, {y})", "torch.mul(input={x}, other={y})",
    "torch.div({x}, {y} ** 2 + 1)", "torch.logaddexp({x}, {y})", "torch.lerp({x}, {y}, 0.25)",
    "torch.addcdiv({x}, {y}, {y}.abs() + 1, value=0.5)", "torch.fmax({x}, {y})",
    "({x}.abs() + 0.5) ** {y}.tanh()", "torch.copysign({x}, {y} ** 2 + 1)",
    "torch.stack(torch.broadcast_tensors({x}, {y}))",
    "F.smooth_l1_loss(*torch.broadcast_tensors({x}, {y}), reduction='none')",
)  # fmt: skip
REDUCTIONS = (
    "{x}.sum({d})", "{x}.sum(dim={d}, keepdim=True)", "{x}.mean({d})",
    "{x}.mean({d}, keepdim=True)", "{x}.amax({d})", "{x}.amin({d}, True)", "{x}.logsumexp({d})",
    "{x}.var({d}, correction=0)", "torch.sqrt({x}.var({d}, unbiased=False) + 0.1)",
    "torch.linalg.vector_norm({x}, dim={d}) + 0.1", "{x}.max({d}).values",
    "torch.min({x}, dim={d}, keepdim=True)[0]", "({x} / 4).prod({d})", "{x}.softmax({d})",
    "F.log_softmax({x}, dim={d})", "{x}.cumsum({d})", "torch.cumsum({x}, dim={d})",
    "({x} / 4).cumprod({d})", "F.normalize({x} + 2, dim={d})", "F.softmin({x}, {d})",
    "torch.sort({x}, dim={d}).values", "torch.topk({x}, 1, dim={d})[0]", "{x}.median({d}).values",
    "{x} - {x}.mean({d}, keepdim=True)", "F.cosine_similarity({x} + 1, {x} * {x}, dim={d})",
    "torch.std_mean({x}, {d}, correction=0)[1]", "{x}.logcumsumexp({d})", "{x}.cummax({d})[0]",
    "{x}.nansum({d})", "{x}.norm(dim={d}) + 0.1", "F.glu({x}, {d})", "{x}.diff(dim={d})",
)  # fmt: skip
MATRIX = (
    "{x} @ {w}", "torch.matmul({x}, {w})", "torch.einsum('...c,cd->...d', {x}, {w})",
    "F.linear({x}, {w}.t())", "F.linear({x}, {w}.mT, bias={b})",
    "F.linear(bias={b}, weight={w}.T, input={x})", "torch.tensordot({x}, {w}, dims=1)",
    "({x}.unsqueeze(-1) * {w}).sum(-2)", "{x} @ ({w} * 2) + {b}",
)  # fmt: skip
SQUARE = (
    "{x} @ {x}.transpose(-1, -2)", "torch.matmul({x}, {x}.mT / 2)", "torch.bmm({x}, {x}.mT)",
    "torch.einsum('nij,nkj->nik', {x}, {x})", "torch.baddbmm({x} @ {x}.mT, {x}, {x}.mT, alpha=0.5)",
    "torch.einsum('bi,bj->bij', {x}, {x})", "torch.addmm({p}, {x}, {w})", "torch.mm({x}, {w})",
    "torch.cdist({x}, {x} + 1)", "torch.outer({x}.flatten()[:4], {x}.flatten()[:3])",
    "F.scaled_dot_product_attention({x}, {x}, {x})", "torch.tril({x})", "{x}.triu(1)",
    "F.scaled_dot_product_attention({x}, {x} / 2, {x}, is_causal=True, scale=0.5)",
    "torch.einsum('nchw,nchw->nc', {x}, {x})", "torch.einsum('...i,...i->...', {x}, {x})",
    "torch.diagonal({x}, dim1=-2, dim2=-1)", "torch.diag_embed({x})",
    "torch.cartesian_prod({x}[0], {p})",
)  # fmt: skip
COMPARE = ("{x} > {t}", "{x} <= {t}", "torch.lt({x}, {t})", "{x}.ge({t})", "torch.ne({x}, {t})")
BOOLEAN = (
    "~{m}", "{m}.logical_not()", "{m} & (~{m})", "torch.logical_or({m}, ~{m})", "{m} ^ {m}",
    "{m}.any(-1)", "{m}.all(-1, keepdim=True)", "{m}.to(torch.int64)", "{m}.long().cumsum(-1)",
    "{m}.sum()", "{m}.double()", "{m}.float()", "{m} * 1.5", "{m}.int() + 1",
    "1.0 - {m}.to(torch.float64)", "{m}.type(torch.float64)", "{m}.sum(-1)",
    "torch.where({m}, 2.0, -1.0).double()",
)  # fmt: skip
INTEGER = (
    "{i} + 1", "{i} * 2", "{i} // 2", "{i} % 3", "torch.remainder({i}, 2)", "{i}.clamp(0, 2)",
    "-{i}", "{i}.double() / 3", "{i}.to(torch.float64)", "{i} / 2.0", "{i} * 1", "{i} * 1.0",
    "{i} + 0.5", "{i} == 1", "{i} > 0", "{i}.bool()", "{i}.abs()", "{i} ** 2 % 5",
    "torch.floor_divide({i}, 2)", "{i} * 0.5", "{i}.sum()", "{i}.max()",
    "torch.bitwise_and({i}, 1)", "{i}.float()", "{i}.to(torch.int32)",
)  # fmt: skip


@statement
def unary(s: Sketch) -> object:
    x = s.pick()
    return x and s.let(s.choose(UNARY).format(x=x))


@statement
def scalar(s: Sketch) -> object:
    x = s.pick()
    return x and s.let(s.choose(SCALAR).format(x=x))


def _joint(a: tuple[int, ...], b: tuple[int, ...]) -> bool:
    try:
        return torch.Size(torch.broadcast_shapes(a, b)).numel() <= MOST
    except RuntimeError:
        return False


@statement
def binary(s: Sketch) -> object:
    """Two values that broadcast, or a value and a parameter."""
    x = s.pick()
    if x is None:
        return None
    y = None
    if s.number(0, 2):
        y = s.pick(lambda one: all(_joint(e[x].shape, e[one].shape) for e in s.envs))
    if y is None:
        y = _parameter_beside(s, x)
    if s.flag():
        return s.let(s.choose(BINARY).format(x=y, y=x))
    return s.let(s.choose(BINARY).format(x=x, y=y))


def _parameter_beside(s: Sketch, x: str) -> str:
    """A parameter that broadcasts with `x`."""
    rank, fixed = len(s.shape(x)), s.fixed(x)
    axes = range(-s.number(0, rank), 0)
    return s.parameter(*(s.shape(x)[i] if i in fixed and s.flag() else 1 for i in axes))


@statement
def duplicate(s: Sketch) -> object:
    """The same expression twice, and the sum of both."""
    x = s.pick()
    one = s.choose(UNARY).format(x=x)
    return x and s.let(f"({one}) + 0.5 * ({one})")


@statement
def reduction(s: Sketch) -> object:
    x = s.pick()
    axis = None if x is None else s.axis(x)
    return x and axis is not None and s.let(s.choose(REDUCTIONS).format(x=x, d=axis))


@statement
def reduction_of_all(s: Sketch) -> object:
    """Over several axes, or all."""
    x = s.pick(lambda one: len(s.shape(one)) > 1)
    if x is None:
        return None
    axes = tuple(s.fixed(x))[-2:]
    form = s.choose(
        ["{x}.sum({d})", "{x}.mean({d}, keepdim=True)", "{x}.mean()", "torch.sum({x})",
         "{x}.amax({d})",
         "{x}.std({d}, correction=0)", "torch.var_mean({x} + 1, {d}, correction=0)[0]", "{x}.max()",
         "{x} / {x}.abs().amax({d}, keepdim=True).clamp(min=0.5)"]
    )  # fmt: skip
    return s.let(form.format(x=x, d=axes))


@statement
def product(s: Sketch) -> object:
    x = s.pick(lambda one: -1 in s.fixed(one))
    if x is None:
        return None
    size, out = s.shape(x)[-1], s.choose([4, 2, 3, 1])
    return s.let(s.choose(MATRIX).format(x=x, w=s.parameter(size, out), b=s.parameter(out)))


@statement
def square(s: Sketch) -> object:
    """Products of a value with itself; most need a certain rank."""
    x = s.pick(lambda one: len(s.shape(one)) >= 2)
    if x is None:
        return None
    size = s.shape(x)[-1]
    return s.let(s.choose(SQUARE).format(x=x, w=s.parameter(size, 3), p=s.parameter(3)))


@statement
def comparison(s: Sketch) -> str | None:
    """With a number that no element comes close to."""
    x = s.pick()
    t: float = s.choose([0.1234567, -0.3210987, 0.7071068])
    return s.let(s.choose(COMPARE).format(x=x, t=t)) if x and s.far_from(x, t) else None


@statement
def selection(s: Sketch) -> object:
    """`where` and `masked_fill` on a value with itself or another of its shape."""
    found = s.pick()
    if found is None or not s.far_from(found, 0.1234567):
        return None
    x: str = found
    y = s.pick(lambda one: s.shape(one) == s.shape(x))
    form = s.choose(
        ["torch.where({x} > 0.1234567, {x}, {y})", "torch.where({x} < 0.1234567, {y}, 0.5)",
         "{x}.masked_fill({x} > 0.1234567, -1.0)", "({x} >= 0.1234567).double() * {y}",
         "torch.where({x} > 0.1234567, 1.0, {x})", "{x} * ({x} > 0.1234567)",
         "torch.floor({x} - 0.1234567) + {y}", "torch.sign({x} - 0.1234567) * {y}",
         "torch.heaviside({x} - 0.1234567, {y})", "F.threshold({x}, 0.1234567, -1.0)"]
    )  # fmt: skip
    if "floor" in form and not s.far_from(x, *(0.1234567 + i for i in range(-20, 20))):
        return None
    return s.let(form.format(x=x, y=y))


@statement
def boolean(s: Sketch) -> object:
    m = s.pick(lambda one: s.value(one).dtype is torch.bool, floating=False) or comparison(s)
    return m and s.let(s.choose(BOOLEAN).format(m=m))


@statement
def integer(s: Sketch) -> object:
    i = s.integer()
    return i and s.let(s.choose(INTEGER).format(i=i))


@statement
def narrow(s: Sketch) -> object:
    """Down to float32 and back; its rounding is what a check must then allow for."""
    if s.number(0, 7) < 7:
        return None
    x = s.pick()
    return x and s.let(s.choose(["{x}.float().double()", "{x}.to(torch.float32)"]).format(x=x))
