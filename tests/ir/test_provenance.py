"""Which modules of the source model the nodes of a graph stand for."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from graphopt.ir import ops
from graphopt.ir.builder import Builder
from graphopt.ir.capture import capture
from graphopt.ir.graph import Graph
from graphopt.ir.provenance import absorbed, inherit, origins, unread
from tests.helpers import Net


@pytest.fixture
def graph() -> Graph:
    """two = act(one(x)), beside = other(x)"""
    modules = {"one": nn.Linear(4, 4), "act": nn.ReLU(), "other": nn.Linear(4, 4)}
    model = Net(lambda net, x: (net.act(net.one(x)), net.other(x)), **modules)
    return capture(model, (torch.randn(2, 4),)).graph


def test_what_is_read_by_nobody_else_goes_with_what_is_replaced(graph):
    one, act, other = graph.calls
    builder = Builder(graph, graph.fx.output_node())
    new = builder.emit(ops.Neg(builder.value(other))).node
    gone = unread([(act, new)], [new])
    assert set(origins(graph, gone)) == {"act", "one", "one.weight", "one.bias"}
    assert unread([(act, one)]) == [act]  # what stands for it stays


def test_a_module_without_an_op_lives_on_in_what_was_made(graph):
    one, act, _ = graph.calls
    builder = Builder(graph, act)
    linear = builder.view(one)
    merged = builder.emit(linear.replace(), like=linear).node
    inherit(graph, [(act, merged)], builder.made, [one, act])
    assert absorbed(merged) == ("act",)
    again = builder.emit(linear.replace(), like=builder.view(merged)).node
    assert origins(graph, [again]) == ("one", "act")


def test_each_of_several_replaced_values_lives_on_in_its_own(graph):
    one, act, other = graph.calls
    builder = Builder(graph, one)
    joint = builder.emit(ops.Neg(builder.value(graph.inputs[0])))
    left, right = joint * 2.0, joint * 3.0
    pairs = [(one, left.node), (other, right.node)]
    inherit(graph, pairs, builder.made, [one, other])
    assert absorbed(left.node) == ()  # it is emitted in the place of `one`
    assert absorbed(right.node) == absorbed(joint.node) == ("other",)
    assert absorbed(act) == ()
