"""Networks for site validation: where each rewrite applies, and where it must not."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from typing import Any

import torch

# Per rewrite, places where it applies and places where it must not: functions of `x` [2, 4, 6, 6],
# `s` [4] (a parameter) and `c` (a convolution), or the modules of a Sequential.
_FOLDS = """conv(), norm(); conv(groups=2, bias=False), norm(); up(groups=2), norm()
    conv(), nn.AvgPool2d(2), norm(); conv(), norm(), norm(); conv(), nn.ZeroPad2d(1), norm()
    conv(), nn.ReLU(), norm(); conv(), nn.Unflatten(1, (2, 2)), nn.Flatten(1, 2), norm()"""
NETWORKS = {
    "drop_times_one": """x * 1; 1.0 * x; x / 1; x * 2 + x * 0; 1 / x; x * torch.tensor([1.0])
        x[:, :1, :1, :1] * torch.ones(4)""",
    "drop_plus_zero": """x + 0; 0.0 + x; x - 0; x + 1; torch.zeros(6).double() - x
        x[:, :1, :1, :1] + torch.zeros(4)""",
    "drop_power_one": "x**1; x**2; x**0; x * x; (x * 9).long() ** 1.0",
    "drop_double_negation": "-(-x); -(-(-x)); -x.relu(); (-x).relu(); -x",
    "drop_repeated_relu": "x.relu().relu(); (-x).relu(); -x.relu(); x.relu() * 2; x.exp().relu()",
    "merge_factors": """x * 2.0 * 3.0; x * 2.0 + 3.0; (x + 2.0) * 3.0; (x * s[0]) * x.sum()
        (x.float() * 2.0).double() * 3.0; x[..., :4] * s * 3.0""",
    "merge_terms": """x + 2.0 + 3.0; x * 2.0 + 3.0; (x + 2.0) * 3.0; (x[..., :4] + s) + 3.0
        (x.float() + 2.0).double() + 3.0""",
    "drop_dropout": "F.dropout(-x, 0.5, False); F.dropout(x, 0.5, True); (-x).relu(); c(x).relu()",
    "drop_cast": "x.to(torch.float64); x.float(); (-x).relu()",
    "merge_casts": """x.float().double().float(); x.long().double()
        x.float().relu().double(); x.bfloat16().float().half()
        ((x * 1e17).long() | 1).double().long() % 64
        x.float().double().long().double()""",
    "drop_copy": """x.clone(); (-x).clone() * 2; (-x).relu()
        x[:, :1].expand(-1, 4, 6, 6).clone().as_strided((9,), (10,))""",
    "drop_view": """x.reshape(x.shape); x.permute(0, 1, 2, 3); x.permute(0, 1, 3, 2); x[:, :, ::2]
        F.pad(x, (0, 0)); F.pad(x, (1, -1)); F.pad(x, (0, 0, 1, -1)); x[:, :, 1:]; x[:, :, 0:6]
        x.reshape(-1, 4, 36); x.repeat(1, 1, 1, 1); x.expand(-1, 4, 6, 6); x.permute(0, 2, 3, 1)""",
    "spell_out_shape": """x.flatten(1).reshape_as(x); s.expand_as(x[..., :4]); x[:1].expand_as(x)
        x.flatten(1).view_as(x); x[:, :1].expand_as(x); x.reshape(-1, 6)""",
    "merge_permutes": """x.permute(0, 2, 3, 1).permute(0, 2, 3, 1); x.mT.permute(0, 2, 1, 3)
        x.permute(0, 2, 3, 1).permute(0, 3, 1, 2); x.permute(0, 2, 1, 3).reshape(-1, 4, 36)""",
    "merge_reshapes": """x.reshape(-1, 4, 36).reshape(-1, 144); x.reshape(-1, 36)
        x.reshape(-1, 36).reshape(-1, 4, 6, 6); x.permute(0, 1, 3, 2).reshape(-1, 4, 36)""",
    "drop_single_cat": "torch.cat([x]); torch.cat([x, -x], 1); torch.cat([-x, x, x], 2)",
    "fold_batch_norm": _FOLDS,
    "fold_batch_norm_into_linear": """norm(), nn.Flatten(), nn.Linear(144, 3)
        norm(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3)
        norm(), nn.Flatten(2), nn.Linear(36, 3)
        norm(), nn.ZeroPad2d(1), nn.Flatten(), nn.Linear(256, 3)
        norm(), nn.Flatten(), nn.Linear(144, 3, bias=False)
        norm(False), nn.Flatten(), nn.Linear(144, 3)
        norm(), nn.AvgPool2d(3, padding=1), nn.Flatten(), nn.Linear(16, 3)""",
    "fold_batch_norm_into_conv": """norm(), conv(); norm(), conv(padding=1); norm(), up(padding=2)
        norm(), conv(groups=2, bias=False); norm(), nn.Dropout(), conv(); norm(), up(groups=2)
        norm(), nn.ZeroPad2d(1), conv(); norm(), conv(padding=1, stride=2)
        norm(), nn.AvgPool2d(2), conv()
        nn.Flatten(2), nn.Unflatten(2, (4, 3, 3)), norm3(), mean(0), conv()
        norm(), view(-1, 4, 6), nn.Conv1d(4, 4, 3); norm(), nn.Flatten(2), nn.Conv1d(4, 4, 3)
        norm(), mean(0), conv()""",
    "fold_scale_shift": """c(x) * s.reshape(4, 1, 1); c(x) - s.reshape(4, 1, 1); c(x) * s
        c(x) / s.reshape(4, 1, 1); s.reshape(4, 1, 1) - c(x); s.reshape(4, 1, 1) + c(x)
        s.reshape(4, 1, 1) / c(x); c(x) * s.reshape(4, 1) * 2; c(x) * s[:1] + s.sum()
        torch.addmm(s, x.reshape(-1, 6), c.weight.flatten()[:24].reshape(6, 4), beta=2) + s""",
    "merge_branches": """add(conv(padding=1), scale()); add(conv(padding=1), norm())
        add(conv(padding=1), nn.Conv2d(4, 4, 1))
        add(nn.Identity(), conv(padding=1, groups=2)); add(conv(padding=1), nn.ReLU())
        add(conv(padding=2, dilation=2), conv(padding=1)); add(conv(padding=1, groups=2), norm())
        add(conv(padding=1, groups=2), conv(padding=1)); add(conv(padding=1), nn.AvgPool2d(3, 1, 1))
        add(conv(padding=1), nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), conv(padding=1)))
        add(conv(stride=4, padding=1), conv(stride=4)); add(up(padding=1), conv(padding=1))
        add(conv(padding=1), nn.AvgPool2d(3, 1, 1, count_include_pad=False))
        add(conv(padding=1), nn.Sequential(nn.Conv2d(4, 4, 1), conv(padding=1)))
        add(nn.Conv2d(4, 4, 5, padding=2, dilation=1), conv(padding=2, dilation=2), norm())""",
    "add_negative_branch": """sub(conv(padding=1), conv(padding=1)); sub(conv(padding=1), norm())
        sub(conv(padding=1), norm(False)); sub(nn.Identity(), conv(padding=1, bias=False))
        sub(conv(padding=1), nn.ReLU()); sub(conv(padding=1), nn.AvgPool2d(3, 1, 1))""",
    "merge_convolutions": """conv(padding=1), conv(); conv(padding=1), conv(padding=1)
        nn.Conv2d(4, 4, 1, bias=False), conv(padding=1); nn.Conv2d(4, 4, 1), conv(padding=1)
        conv(stride=2), nn.Conv2d(4, 4, 2); conv(padding=2, dilation=2), conv(dilation=2)
        conv(groups=2), nn.Conv2d(4, 6, 1, groups=2); conv(groups=2), nn.Conv2d(4, 3, 2)
        conv(dilation=2), nn.Conv2d(4, 4, 2); conv(), up(); up(), conv(); conv(), nn.ReLU(), conv()
        nn.Conv2d(4, 4, 1, bias=False, padding=1), conv(padding=1)
        nn.Conv2d(4, 4, 1, bias=False, stride=2), conv(padding=1)""",
    "merge_padding": """nn.ZeroPad2d(1), conv(); nn.ZeroPad2d((2, 2, 1, 1)), conv(padding=1)
        nn.ZeroPad2d((1, 0, 1, 0)), conv(); nn.ReflectionPad2d(1), conv(); nn.ZeroPad2d(1), up()
        nn.ConstantPad2d(1, 0.5), conv(); nn.ZeroPad2d((1, 1, 0, 0)), conv(padding=(0, 1))
        nn.ZeroPad2d((-1, -1, 1, 1)), conv(padding=2)
        nn.ConstantPad3d(1, 0.0), nn.Conv2d(6, 4, 3)""",
    "merge_linears": """nn.Linear(6, 5), nn.Linear(5, 3); nn.Linear(6, 5, False), nn.Linear(5, 3)
        nn.Linear(6, 5), nn.Linear(5, 3, False); nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)""",
}  # fmt: skip


class Net(torch.nn.Module):
    """The network that a text of `NETWORKS` stands for; its output is never its input."""

    def __init__(self, text: str) -> None:
        super().__init__()
        nn = torch.nn
        self.c, self.s = nn.Conv2d(4, 4, 3), nn.Parameter(torch.tensor([0.5, -2.0, 1.5, 3.0]))
        scope = {
            "nn": nn, "F": nn.functional, "torch": torch, "norm": _norm,
            "scale": lambda: _norm(shift=False),
            "norm3": functools.partial(_norm, kind=nn.BatchNorm3d),
            "conv": functools.partial(nn.Conv2d, 4, 4, 3),
            "up": functools.partial(nn.ConvTranspose2d, 4, 4, 3),
            "add": lambda *terms: Total(terms, 1), "sub": lambda *terms: Total(terms, -1),
            "mean": lambda dim: Apply(lambda x: x.mean(dim)),
            "view": lambda *shape: Apply(lambda x: x.reshape(shape)),
        }  # fmt: skip
        chain = re.match(r"(nn\.|norm|conv|up|add|sub)", text)
        self.text = text
        self.f = eval(f"nn.Sequential({text})" if chain else f"lambda x, s, c: {text}", scope)

    def forward(self, x: torch.Tensor) -> Any:
        y = self.f(x) if isinstance(self.f, torch.nn.Module) else self.f(x, self.s, self.c)
        return y.sin()


class Apply(torch.nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


class Total(torch.nn.Module):
    """The first module of one input, with the others added or subtracted."""

    def __init__(self, terms: tuple[torch.nn.Module, ...], sign: int) -> None:
        super().__init__()
        self.terms, self.sign = torch.nn.ModuleList(terms), sign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = (term(x) for term in self.terms)
        for one in rest:
            first = first + one if self.sign > 0 else first - one
        return first


def _norm(
    affine: bool = True, kind: Any = torch.nn.BatchNorm2d, shift: bool = True
) -> torch.nn.Module:
    norm: torch.nn.Module = kind(4, eps=0.1, affine=affine)
    if not shift:
        norm.bias = None
    for one in (*norm.parameters(), norm.running_mean, norm.running_var):
        one.data.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return norm


def networks(name: str) -> list[torch.nn.Module]:
    texts = [one for line in NETWORKS[name].splitlines() for one in line.split(";")]
    return [Net(one.strip()).double().eval() for one in texts]
