"""A scan in the place of a chain of steps: what is emitted, and where."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir import ops
from graphopt.ir.affine import same_shape
from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, is_pure
from graphopt.ir.recurrence.body import written
from graphopt.ir.recurrence.chain import Chain
from graphopt.ir.recurrence.operator import types_alone
from graphopt.ir.recurrence.steps import NotSteps, element, filled, tensor
from graphopt.ir.value import Value

aten = torch.ops.aten


class Rolled:
    """What is emitted for one chain.

    Attributes:
        pairs: (old value, what takes its place).
        values: for each output, (what the graph has for steps, what the scan makes for all of them);
            for a last state, the step is -1.
    """

    def __init__(self, graph: Graph, chain: Chain, starts: Sequence[float | None]) -> None:
        self.graph, self.chain, self.starts = graph, chain, starts
        self.gone = set(chain.nodes) - self._before_the_loop()
        self.steps = chain.steps - chain.start
        self.pairs: list[tuple[fx.Node, fx.Node]] = []
        self.values: list[tuple[dict[int, fx.Node], fx.Node]] = []
        self._moved: list[tuple[fx.Node, fx.Node]] = []
        self._elements: dict[fx.Node, fx.Node] = {}  # one element of a stack, for its type
        self.builder: Builder

    def _before_the_loop(self) -> set[fx.Node]:
        """What the states start from."""
        chain, found = self.chain, set[fx.Node]()
        if None not in self.starts:
            return found
        own = set(chain.nodes)
        stack = [*chain.first_roots, *(one for one in chain.initial if isinstance(one, fx.Node))]
        while stack:
            if (node := stack.pop()) not in found and node in own:
                found.add(node)
                stack += node.all_input_nodes
        return found

    # -- what is read, and by whom ----------------------------------------------------------------

    def readers(self, node: fx.Node) -> list[fx.Node]:
        """What reads a value of the chain and stays; of tensors full of a number, that is only done for
        their shape."""
        return [user for user in node.users if user not in self.gone]

    def emit(self) -> None:
        """Raises NotSteps or BodyError, naming the operation."""
        chain = self.chain
        if self.steps < 2:
            raise NotSteps(
                f"two steps, the first of which starts from numbers: {chain.nodes[0].name} alone is left"
            )
        if None in chain.links:
            raise NotSteps("no step shows what becomes of a state")
        links = [one for one in chain.links if one is not None]
        last = self.steps - 1
        outputs, finals = [], []
        for number, nodes in enumerate(chain.roots):
            read = [step for step, one in enumerate(nodes) if one is not None and self.readers(one)]
            if read == [last] and number in links:
                finals.append(number)
            elif read:
                outputs.append(number)
        users = [
            user for number in (*outputs, *finals)
            for one in chain.roots[number] if one is not None for user in self.readers(one)
        ]  # fmt: skip
        if not users:
            raise NotSteps("nothing reads what the steps make")
        before = min(users)
        states = [one if isinstance(one, fx.Node) else chain.first_roots[one] if isinstance(one, int)
                  else None for one in chain.initial] if None in self.starts else []  # fmt: skip
        body = self._body(outputs, links)
        others = [one for one in chain.invariants if filled(one) is None]
        reads = [one for nodes in chain.inputs for one in nodes]
        self._hoist([*reads, *others, *(one for one in states if one is not None)], before)
        self.builder = Builder(self.graph, before)
        xs = [self._stacked(nodes) for nodes in chain.inputs]
        held = [states[i] or self._start(i, xs) if states else self._start(i, xs)
                for i in range(len(links))]  # fmt: skip
        scan = self._call(str(body), held, xs, others)
        self._hand_out(scan, outputs, finals, links)

    def _body(self, outputs: Sequence[int], links: Sequence[int]) -> Any:
        """The step: (inputs, states, invariants) to (outputs, states)."""
        chain, graph = self.chain, self.chain.body.graph
        places = [node for node in graph.nodes if node.op == "placeholder"]
        roots: Any = graph.output_node().args[0]
        count = len(chain.inputs) + len(chain.links)
        full = {
            place: value for place, one in zip(places[count:], chain.invariants, strict=True)
            if (value := filled(one)) is not None
        }  # fmt: skip
        for place, value in full.items():
            fake = tensor(place)
            like = next((one for one in places if one not in full
                         and same_shape(tensor(one).shape, fake.shape)), None)  # fmt: skip
            if like is None:
                raise NotSteps(
                    f"{place.name} is a tensor of shape {list(fake.shape)} that nothing has"
                )
            with graph.inserting_after(places[-1]):
                node = graph.call_function(
                    aten.full_like.default, (like, value), {"dtype": fake.dtype}
                )
            node.meta = dict(place.meta)
            place.replace_all_uses_with(node)
        wanted = [roots[i] for i in (*outputs, *links)]
        return written(graph, wanted, [one for one in places if one not in full])

    def _start(self, state: int, xs: Sequence[fx.Node]) -> fx.Node:
        """A tensor full of the number that a state starts from."""
        places = [one for one in self.chain.body.graph.nodes if one.op == "placeholder"]
        wanted = tensor(places[len(self.chain.inputs) + state])
        given = [(nodes[0], x) for nodes, x in zip(self.chain.inputs, xs, strict=True)]
        given += [(one, one) for one in self.chain.invariants if filled(one) is None]
        for one, source in given:
            fake = tensor(one)
            if same_shape(fake.shape, wanted.shape) and fake.device == wanted.device:
                if source is not one:
                    one = self._emit(ops.Select(self._value(source), 0, 0))
                kwargs = {"dtype": wanted.dtype} if fake.dtype != wanted.dtype else {}
                arguments = {"self": self._value(one), "fill_value": self.starts[state], **kwargs}
                return self.builder.call(aten.full_like.default, arguments).node
        raise NotSteps(f"a state of shape {list(wanted.shape)}, which nothing that is read has")

    # -- order ------------------------------------------------------------------------------------

    def _hoist(self, nodes: Iterable[fx.Node], before: fx.Node) -> None:
        """Move values, with all they depend on, in front of a node."""
        cone: set[fx.Node] = set()
        stack = [one for one in nodes if not one < before]
        while stack:
            node = stack.pop()
            if node in cone:
                continue
            if node in self.gone or node is before:
                raise NotSteps(f"{node.name} ({node.target}) is needed before all steps are there")
            if not is_pure(node):
                raise NotSteps(f"{node.name} ({node.target}) is random or writes, and cannot move")
            cone.add(node)
            stack += [one for one in node.all_input_nodes if not one < before]
        for node in sorted(cone):
            self._moved.append((node, node.next))
            before.prepend(node)

    def rollback(self) -> None:
        if hasattr(self, "builder"):
            self.builder.rollback()
        for node, following in reversed(self._moved):
            following.prepend(node)
        self._moved.clear()

    # -- emitting ---------------------------------------------------------------------------------

    def _emit(self, op: ops.Op) -> fx.Node:
        return self.builder.emit(op).node

    def _value(self, node: fx.Node) -> Value:
        return self.builder.value(node)

    def _stacked(self, nodes: Sequence[fx.Node]) -> fx.Node:
        """What every step reads, along a first axis."""
        places = [element(one) for one in nodes]
        known = [one for one in places if one is not None]
        if len(known) == len(nodes) and len({one[:2] for one in known}) == 1:
            whole, axis, _ = known[0]
            axis %= tensor(whole).ndim
            count = tensor(whole).shape[axis]
            times = [time + count if time < 0 else time for _, _, time in known]
            start, end = min(times), max(times) + 1
            ahead, back = list(range(start, end)), list(range(end - 1, start - 1, -1))
            if times in (ahead, back):
                node = whole
                if (start, end) != (0, count):
                    node = self._emit(ops.Slice(self._value(node), axis, start, end))
                if times != ahead:
                    node = self._emit(ops.Flip(self._value(node), (axis,)))
                return self._axis_moved(node, axis, 0)
        return self._emit(ops.Stack(tuple(map(self._value, nodes))))

    def _axis_moved(self, node: fx.Node, source: int, to: int) -> fx.Node:
        if source == to:
            return node
        order = [axis for axis in range(tensor(node).ndim) if axis != source]
        order.insert(to, source)
        return self._emit(ops.Permute(self._value(node), tuple(order)))

    def _call(
        self, body: str, states: Sequence[fx.Node], xs: Sequence[fx.Node], others: Sequence[fx.Node]
    ) -> fx.Node:
        values = [tuple(map(self._value, group)) for group in (states, xs, others)]
        with types_alone():
            value = self.builder.emit(ops.Scan(body, self.steps, *values))
        root = next(one for nodes in self.chain.roots for one in nodes if one is not None)
        value.node.meta["where"] = self.graph.where(root)
        value.node._rename("scan")
        return value.node

    def _part(self, scan: fx.Node, index: int, like: fx.Node) -> fx.Node:
        return self._node(operator.getitem, (scan, index), scan.meta["val"][index], like)

    def _typed(self, node: fx.Node, like: fx.Node) -> fx.Node:
        """A result in the dtype that it has in the graph; a step of float64 is float64 everywhere."""
        dtype = tensor(like).dtype
        if tensor(node).dtype == dtype:
            return node
        return self._emit(ops.Cast(self._value(node), dtype))

    def _node(self, target: Any, args: tuple[Any, ...], value: Any, like: fx.Node) -> fx.Node:
        """A call whose type is known."""
        with self.graph.fx.inserting_before(self.builder.before):
            node = self.graph.fx.call_function(target, args)
        node.meta.update(val=value, where=self.graph.where(like))
        self.builder.made.append(node)
        return node

    def _hand_out(
        self, scan: fx.Node, outputs: Sequence[int], finals: Sequence[int], links: Sequence[int]
    ) -> None:
        for index, number in enumerate(outputs):
            nodes = self.chain.roots[number]
            model = next(one for one in nodes if one is not None)
            if tensor(model).shape != scan.meta["val"][index].shape[1:]:
                raise NotSteps(f"{model.name} does not have one shape in all steps")
            whole = self._typed(self._part(scan, index, model), model)
            self.values.append(({t: one for t, one in enumerate(nodes) if one is not None}, whole))
            single: dict[fx.Node, None] = {}
            stacks: dict[fx.Node, fx.Node] = {}
            for one in filter(None, nodes):
                for user in self.readers(one):
                    if user not in stacks:
                        made = self._stack(user, nodes, whole)
                        if made is None:
                            single[one] = None
                        else:
                            stacks[user] = made
            self.pairs += stacks.items()
            for one in single:
                self.pairs.append((one, self._element(whole, nodes.index(one), one)))
        for number in finals:
            old = self.chain.roots[number][-1]
            assert old is not None
            new = self._typed(self._part(scan, len(outputs) + links.index(number), old), old)
            self.values.append(({-1: old}, new))
            self.pairs.append((old, new))

    def _element(self, whole: fx.Node, step: int, old: fx.Node) -> fx.Node:
        if whole in self._elements:
            args = (whole, 0, step)
            node = self._node(aten.select.int, args, self._elements[whole].meta["val"], old)
        else:
            node = self._elements[whole] = self._emit(ops.Select(self._value(whole), 0, step))
        if any(user.op == "output" for user in self.readers(old)):
            return self._emit(ops.Copy(self._value(node)))  # outputs must not share memory
        return node

    def _stack(
        self, user: fx.Node, nodes: Sequence[fx.Node | None], whole: fx.Node
    ) -> fx.Node | None:
        """What takes the place of a reader that stacks all steps, in the order of time or backwards."""
        op = self.builder.view(user)
        if not isinstance(op, (ops.Stack, ops.Cat)):
            return None
        parts: list[Any] = [one.node for one in op.tensors]
        if parts == list(nodes):
            pass
        elif parts == list(reversed(nodes)):
            whole = self._emit(ops.Flip(self._value(whole), (0,)))
        else:
            return None
        axis = op.dim % tensor(user).ndim
        if isinstance(op, ops.Stack):
            return self._axis_moved(whole, 0, axis)
        # Concatenated: time and an axis become one.
        moved = self._axis_moved(whole, 0, axis)
        value = self._value(moved).meta.shape
        sizes = [*value[:axis], -1, *value[axis + 2 :]]
        if sum(not isinstance(one, int) or one == -1 for one in sizes) > 1:
            target = self.builder.call(
                aten.flatten.using_ints,
                {"self": self._value(moved), "start_dim": axis, "end_dim": axis + 1},
            )
            return target.node
        return self._emit(ops.Reshape(self._value(moved), tuple(sizes)))
