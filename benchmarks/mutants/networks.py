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
    up(groups=4), norm(); nn.ConvTranspose2d(4, 6, 3, groups=2), norm(channels=6)
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
    "fold_batch_norm": f"""{_FOLDS}
        conv(), nn.ReflectionPad3d((0, 0, 0, 0, 1, 1)), norm(channels=6)
        add(conv(), nn.Conv2d(4, 1, 3)), norm(); add(nn.Conv2d(4, 1, 3), conv()), norm()""",
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
        norm(), mean(0), conv()
        repeat(3), norm(), view(-1, 24, 36), nn.Conv1d(24, 2, 3)
        norm(), view(-1, 2, 2, 6, 6), nn.Conv3d(2, 1, (1, 2, 2))""",
    "fold_scale_shift": """c(x) * s.reshape(4, 1, 1); c(x) - s.reshape(4, 1, 1); c(x) * s
        c(x) / s.reshape(4, 1, 1); s.reshape(4, 1, 1) - c(x); s.reshape(4, 1, 1) + c(x)
        s.reshape(4, 1, 1) / c(x); c(x) * s.reshape(4, 1) * 2; c(x) * s[:1] + s.sum()
        F.avg_pool1d(F.linear(x.flatten(1, 2), c.weight.reshape(-1, 6)[:4]), 2) * s[:2]
        torch.addmm(s, x.reshape(-1, 6), c.weight.flatten()[:24].reshape(6, 4), beta=2) + s""",
    "collect_terms": """(lambda y: y * s.reshape(4, 1, 1) + y)(c(x)); (lambda y: y + y + c(-x))(c(x))
        (lambda y: (y - s.reshape(4, 1, 1)) * s.reshape(4, 1, 1) + y)(c(x)); (lambda y: 2.0 * y - y)(c(x))
        (lambda y: (y * s[0] - 3.0) * 2.0 + (y + 1.0) * s.reshape(4, 1, 1))(c(x))
        (lambda y: y * 2.0 + y * y)(c(x)); (lambda y: (y + 1.0).float() + y.float())(c(x))
        (lambda y: s.reshape(4, 1, 1) * (y * 2.0 + 1.0) - (y - 2.0) * 3.0)(c(x))
        (lambda y: y * s + y * s.reshape(4, 1, 1))(c(x)); add(scale(), nn.Identity()); sub(norm(), norm())
        (lambda y: y + s.reshape(4, 1, 1) * (y + y))(c(x))""",
    "gather_terms": """(lambda y: y + (c(-x) + y * s.reshape(4, 1, 1)))(c(x)); c(x) + (c(-x) + x[..., :4, :4])
        (lambda y: (y + c(-x)) + y * 2.0)(c(x)); (lambda y: (y.mean() + y) + y * 2.0)(c(x))
        (lambda y: (y * 2.0 + c(-x)) + (y - 1.0))(c(x)); (c(x) + c(-x)) + 3.0
        (lambda y: y + (y * s.reshape(4, 1, 1) + 3.0))(c(x))""",
    "merge_branches": """add(conv(padding=1), scale()); add(conv(padding=1), norm())
        add(conv(padding=1), nn.Conv2d(4, 4, 1))
        add(nn.Identity(), conv(padding=1, groups=2)); add(conv(padding=1), nn.ReLU())
        add(conv(padding=2, dilation=2), conv(padding=1)); add(conv(padding=1, groups=2), norm())
        add(conv(padding=1, groups=2), conv(padding=1)); add(conv(padding=1), nn.AvgPool2d(3, 1, 1))
        add(conv(padding=1), nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), conv(padding=1)))
        add(conv(stride=4, padding=1), conv(stride=4)); add(up(padding=1), conv(padding=1))
        add(conv(padding=1), nn.AvgPool2d(3, 1, 1, count_include_pad=False))
        add(conv(padding=1), nn.Sequential(nn.Conv2d(4, 4, 1), conv(padding=1)))
        add(nn.Conv2d(4, 4, 5, padding=2, dilation=1), conv(padding=2, dilation=2), norm())
        add(nn.Conv2d(4, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, groups=2)))
        add(conv(padding=1), nn.Sequential(conv(padding=1), norm()))
        add(conv(), nn.Sequential(nn.Conv2d(4, 4, 1, bias=False), nn.ZeroPad2d(-1)))""",
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
    "merge_linear_branches": """add(nn.Linear(6, 6), nn.Linear(6, 6)); add(nn.Linear(6, 6), nn.Identity())
        add(nn.Linear(6, 6, False), nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 6)))
        add(nn.Sequential(nn.ReLU(), nn.Linear(6, 6)), nn.Linear(6, 6))
        add(nn.Linear(6, 6), nn.Linear(6, 6, False)); add(nn.Linear(6, 6), nn.ReLU())""",
    "merge_region": """lin(x, c).float().flip(-1); lin(x, c) + x.flip(-1) @ w(c); lin(x, c) + x.flip(2) @ w(c)
        lin(torch.einsum("...rk,rkc->...rc", x.unflatten(-1, (2, 3)), w(c).view(4, 3, 3)[:2]).flatten(-2), c)
        lin(x, c) - x[..., torch.tensor([5, 4, 3, 2, 1, 0])]; lin(x, c) + x.abs()
        lin(x, c) * x; lin(x, c) * w(c)[0] + x.roll(2, -1); lin(x, c) + x.flip(-1) * w(c)
        torch.cat([x[..., 1:], x[..., :1] * s[0]], -1) + lin(x, c); lin(x, c) + w(c)
        torch.addmm(w(c)[0], x.reshape(-1, 6), w(c), alpha=0.5).view(x.shape) + x / 3.0
        x.view(-1, 2, 3).sum(-1, keepdim=True).expand(-1, 2, 3).reshape(x.shape) - F.linear(x, w(c), w(c)[1])
        lin(x, c) + torch.stack([-x[..., 3:], x[..., :3]], -1).flatten(-2) * w(c)[2]
        lin(x, c) + (w(c) @ x.transpose(-1, -2)).transpose(-1, -2); lin(x, c) + w(c) @ x
        lin(x, c) + F.pad(x[..., 1:4], (1, 2)).cumsum(-1); lin(x, c) + x.transpose(2, 3)
        lin(x, c) + torch.fft.irfft(torch.fft.rfft(x) * torch.fft.rfft(w(c)[0]), n=6).mean(-1, True)""",
    "absorb_number": """c(x) * 2.0; c(x) - 0.5; 0.5 - c(x); c(x) / 4.0; 3.0 - c(x) * 2.0
        (c(x) + c(-x)) * 0.5; (c(x) - s.reshape(4, 1, 1)) * 0.5; c(x).relu() * 2.0
        c(x).relu() * -2.0; F.max_pool2d(c(x), 2) * 3.0; torch.cat([c(x), c(-x)], 2) + 0.5
        c(x).flatten(2) * 2.0; c(x).permute(0, 2, 3, 1) + 1.0; F.pad(c(x), (1, 1)) + 1.0
        F.pad(c(x), (1, 1)) * 3.0; c(x).mean((2, 3)) + 1.0; F.avg_pool2d(c(x), 2, 1, 1) + 1.0
        (c(x) * s.reshape(4, 1, 1)) * 2.0; c(x) * c(-x) * 0.5; c(x)[:, 1:3] * 2.0
        F.prelu(c(x), s) * 2.0; (c(x) @ c(-x).mT) * 0.5; 2.0 / c(x); c(x).abs() / 2.0
        up(groups=2), norm(), times(2.0)
        nn.ConvTranspose2d(4, 6, 3, groups=2), norm(channels=6), times(2.0)
        (lambda y: half(y, s) * 2.0 + y.narrow(1, 2, 2))(c(x))
        (lambda y: half(y, s) * 2.0 + y.narrow(1, 1, 2))(c(x))
        (lambda y: half(y, s) * 2.0 + y.flip(1).narrow(1, 0, 2))(c(x))""",
    "drop_identity_factor": """x @ (w(c) @ e(6)); x @ (e(6) @ w(c))
        x @ F.linear(e(6), w(c)); x[..., :4] @ (s.diag() @ e(4, 6))
        x @ (e(6, 4) @ s.diag()); x @ (w(c) @ w(c).T); F.linear(w(c), w(c)) @ x
        x[..., :4] @ F.linear(e(4), s.diag(), s)
        x @ F.linear(e(6, 4), s[None]); x @ (w(c).T[None] @ e(6))
        x @ F.linear(e(6), w(c)[:3]); x @ (e(6)[None] @ w(c))""",
    "multiply_out_right": """x @ (w(c) @ (e(6) - w(c)[:, :1] @ w(c)[:1]))
        x @ (w(c) @ (w(c)[:, :1] @ w(c)[1:2])); x @ (w(c) @ (e(6) * 3.0))
        x @ (w(c) @ (w(c)[1:2].T @ w(c)[:1] + e(6))); x @ (w(c) @ (w(c) - w(c).T))
        x @ (w(c) @ (e(6) + w(c)[:1])); x @ (w(c) @ (e(6) * w(c)))
        x @ (w(c)[:2].T @ (e(6)[:2] + w(c)[:2, :1] @ w(c)[3:4]))
        x @ (w(c) @ (e(6) + w(c)[:, :1])); x @ (w(c) @ (e(6) + w(c)[:1, :1]))
        x @ (w(c) @ (2.0 - e(6))); x @ (x[:1] @ (w(c)[:, :1] @ w(c)[1:2]))
        x @ (w(c)[:2].T @ e(2) @ w(c)[:2]); x @ (w(c) @ (s[:1] * e(6)))
        x @ (w(c) @ (w(c)[:1] * e(6))); x @ (w(c)[None] @ (w(c)[:, :1] @ w(c)[:1]))""",
    "multiply_out_left": """x @ ((e(6) - w(c)[:, :1] @ w(c)[:1]) @ w(c))
        x @ ((w(c)[:, :1] @ w(c)[1:2]) @ w(c)); x @ ((e(6) * 3.0) @ w(c))
        x @ ((w(c)[1:2].T @ w(c)[:1] + e(6)) @ w(c)); x @ ((w(c) - w(c).T) @ w(c))
        x @ ((e(6) + w(c)[:1]) @ w(c)); x @ ((e(6) * w(c)) @ w(c))
        x @ ((w(c)[:, :1] @ w(c)[:1]) @ w(c)[:, :2]); x @ ((2.0 - e(6)) @ w(c))
        x @ ((e(6)[:, :2] + w(c)[:, :1] @ w(c)[3:4, :2]) @ w(c)[:2])
        x @ ((e(6) + w(c)[:, :1]) @ w(c)); x @ ((e(6) + w(c)[:1, :1]) @ w(c))
        x @ ((w(c)[:, :1] * e(6)) @ w(c)); x @ ((w(c)[:, :1] @ w(c)[:1]) @ w(c)[None])""",
    "absorb_into_linear": """F.linear(x * 2.0, c.weight.reshape(-1, 6))
        F.linear(x.relu() * 2.0, c.weight.reshape(-1, 6))
        F.linear((x[..., :4] * s).relu(), s.diag()); F.linear(x[..., :4] + s, s.diag(), s)
        F.linear(x - 0.5, c.weight.reshape(-1, 6)); F.linear(x[..., :4] / s, s.diag(), s)
        F.linear((x * 2.0).relu(), c.weight.reshape(-1, 6))
        F.linear((-2.0 * x).relu(), c.weight.reshape(-1, 6))
        F.linear(x.permute(0, 2, 3, 1) * s, s.diag())
        F.linear((x * s.reshape(4, 1, 1)).mean((2, 3)), s.diag())
        F.linear((x + s.reshape(4, 1, 1)).mean((2, 3)), s.diag()); F.linear(s - x[..., :4], s.diag())
        F.linear((x[0, :, :4, :4] * s).permute(1, 2, 0), s.diag())""",
    "absorb_into_conv": """c((x - s.reshape(4, 1, 1)) / 2.0); c(x * s.reshape(4, 1, 1)); c((x * 2.0).relu())
        F.conv2d(x * 2.0, c.weight, c.bias, padding=1); F.conv2d(x + 1.0, c.weight, padding=1)
        F.conv2d(x - s.reshape(4, 1, 1), c.weight[:1], padding=1); c(F.max_pool2d(x * 3.0, 3, 1))
        c(F.max_pool2d(x * -3.0, 3, 1)); c((x + s.reshape(4, 1, 1)).relu()); c(F.pad(x * 2.0, (1, 1)))
        F.conv_transpose2d(x + 1.0, c.weight[:, :, :1]); c(F.avg_pool2d(x + 1.0, 2, 1))
        F.conv2d(x * s.reshape(4, 1, 1), c.weight[:, :2], groups=2); c((x * s.reshape(4, 1, 1)).relu())
        c((torch.stack([x, -x]) * 2.0).mean(0)); c((torch.stack([x, -x]) * s.reshape(4, 1, 1)).mean(0))
        c((torch.stack([x, -x, x, x], 2) * s.reshape(4, 1, 1, 1)).mean(1))
        c((x.unflatten(1, (2, 2)) * s[:2].reshape(2, 1, 1, 1)).flatten(1, 2))
        F.conv1d((x * s.reshape(4, 1, 1)).reshape(-1, 8, 18), x.new_ones(3, 8, 2))
        F.conv3d((x * s.reshape(4, 1, 1)).view(-1, 2, 2, 6, 6), x.new_ones(1, 2, 1, 2, 2))
        F.conv3d((x.view(-1, 2, 2, 6, 6) * s[:2, None, None, None]).view(2, 1, 4, 6, 6), x[:1, :1, None])""",
    "drop_key_bias": """attend(); attend(heads=2); attend(turned=True); attend(bias=False)
        attend(heads=2, scaled=True); attend(folded=True)""",
    "move_value_bias": """attend(); attend(heads=2); attend(turned=True); attend(masked=True)
        attend(bias=False); attend(heads=2, out=False); attend(causal=True)
        attend(heads=2, mixed=True)""",
    "stack_concatenated": """cat(conv(), conv()); cat(conv(), conv(bias=False), nn.Conv2d(4, 2, 3))
        cat(conv(padding=1), nn.Identity(), conv(padding=1))
        cat(conv(padding=1), conv(padding=1, groups=2))
        cat(conv(padding=1), conv(padding=1), nn.ReLU())
        cat(conv(stride=2, padding=1), nn.Conv2d(4, 4, 2, 2))
        cat(nn.Linear(6, 6), nn.Linear(6, 6)); torch.cat([c(x), c(-x)], 1); torch.cat([c(x), c(x + 1)], 2)
        torch.cat([F.linear(x, x.new_ones(5, 6)), F.linear(x, c.weight.reshape(-1, 6))], -1)""",
    "stack_siblings": """sub(nn.Linear(6, 6), nn.Linear(6, 6)); sub(nn.Linear(6, 6), nn.Linear(6, 6, False))
        attend(); attend(heads=2); sub(conv(), conv()); sub(conv(), conv(groups=2))
        sub(nn.Linear(6, 6), nn.Sequential(nn.ReLU(), nn.Linear(6, 6)))
        sub(conv(), nn.Conv2d(4, 4, 3, dilation=1))
        sub(nn.Linear(6, 6), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)))""",
    "stack_added": """add(mlp(5), mlp(3)); add(mlp(5, bias=False), mlp(3)); add(mlp(5, nn.GELU()), mlp(3))
        add(mlp(5, nn.ELU(0.5)), mlp(3, nn.ELU(0.7))); add(mlp(5, nn.ELU(0.5)), mlp(3, nn.ELU(0.5)))
        add(mlp(5), nn.Sequential(nn.Tanh(), mlp(3))); add(mlp(5, nn.PReLU(4)), mlp(3, nn.PReLU(4)))
        add(mlp(5), nn.Sequential(nn.Linear(6, 3), nn.ReLU(), nn.Linear(3, 6, False)))
        (lambda y: F.linear(y, w(c)) + minus(x, w(c)) + y)(F.linear(x, w(c)).relu())
        (lambda y: F.linear(y.relu(), w(c)) + minus(x, w(c)) + y)(F.linear(x, w(c)))
        (lambda y: y + minus(x, w(c)) * y)(F.linear(F.linear(x, w(c)).relu(), w(c)))""",
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
            "cat": lambda *terms: Total(terms, 0), "attend": Attend,
            "mean": lambda dim: Apply(lambda x: x.mean(dim)),
            "view": lambda *shape: Apply(lambda x: x.reshape(shape)),
            "half": lambda x, s: nn.functional.batch_norm(x.narrow(1, 0, 2), *s.detach().split(2)),
            "repeat": lambda count: Apply(lambda x: x.repeat(count, 1, 1, 1)),
            "w": _square, "lin": lambda x, c: nn.functional.linear(x, _square(c)),
            "e": functools.partial(torch.eye, dtype=torch.float64),
            "times": lambda by: Apply(lambda x: x * by),
            "minus": lambda x, w: nn.functional.linear(nn.functional.linear(x, -w).relu(), w),
            "mlp": lambda width, act=None, bias=True: nn.Sequential(
                nn.Linear(6, width, bias), act or nn.ReLU(), nn.Linear(width, 6)
            ),
        }  # fmt: skip
        chain = re.match(r"(nn\.|norm|conv|up|add|sub|cat|attend|repeat)", text)
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


class Attend(torch.nn.Module):
    """Attention with projections; `masked` leaves some queries nothing, `mixed` mixes the heads of
    different queries, `folded` the features of different tokens."""

    def __init__(
        self, heads: int = 1, bias: bool = True, turned: bool = False, masked: bool = False,
        causal: bool = False, scaled: bool = False, out: bool = True, mixed: bool = False,
        folded: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.q, self.k, self.v = (torch.nn.Linear(6, 4, bias=bias) for _ in range(3))
        self.out = torch.nn.Linear(4, 3, bias=out)
        self.heads, self.turned, self.masked, self.scaled = heads, turned, masked, scaled
        self.causal, self.mixed, self.folded = causal, mixed, folded

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(1, 2)
        q, k, v = (self.split(one(x)) for one in (self.q, self.k, self.v))
        if self.turned:
            k = k * torch.arange(1.0, 25.0, dtype=k.dtype)[:, None]
        mask = (torch.arange(24)[:, None] > 3).expand(24, 24) if self.masked else None
        options = {"scale": 0.25} if self.scaled else {}
        y = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, mask, is_causal=self.causal, **options
        )
        y = y if self.mixed or self.folded else y.transpose(1, 2)
        return self.out(y.reshape(-1, 24, 4))  # type: ignore[no-any-return]

    def split(self, x: torch.Tensor) -> torch.Tensor:
        if self.folded:
            return x.reshape(-1, 48, 2)
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class Total(torch.nn.Module):
    """The first module of one input, with the others added (1), subtracted (-1) or behind (0)."""

    def __init__(self, terms: tuple[torch.nn.Module, ...], sign: int) -> None:
        super().__init__()
        self.terms, self.sign = torch.nn.ModuleList(terms), sign

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, *rest = found = [term(x) for term in self.terms]
        if self.sign == 0:
            return torch.cat(found, 1)
        for one in rest:
            first = first + one if self.sign > 0 else first - one
        return first


def _square(conv: torch.nn.Conv2d) -> torch.Tensor:
    return conv.weight.flatten()[:36].view(6, 6)


def _norm(
    affine: bool = True, kind: Any = torch.nn.BatchNorm2d, shift: bool = True, channels: int = 4
) -> torch.nn.Module:
    norm: torch.nn.Module = kind(channels, eps=0.1, affine=affine)
    if not shift:
        norm.bias = None
    for one in (*norm.parameters(), norm.running_mean, norm.running_var):
        one.data.uniform_(0.5, 2.0)  # type: ignore[union-attr]
    return norm


def networks(name: str) -> list[torch.nn.Module]:
    texts = [one for line in NETWORKS[name].splitlines() for one in line.split(";")]
    return [Net(one.strip()).double().eval() for one in texts]
