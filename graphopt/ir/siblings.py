"""Calls that compute the same function of different values, and can be one.

Siblings are calls of one op with the same numbers and the same parameters. Sites with parameters (a
convolution, a norm) are siblings by these; ops without (an activation, a sum, a pool) if each of them
reads what siblings compute, or the parts of one value: the first what the first ones compute, the second
what the second ones do, and so on.

Siblings that are to become one must not depend on each other, not even through others that become one.
So the graph is scheduled: calls run once all that they read has run, but sites with parameters wait until
nothing else can. Then those of one site that wait are siblings: none depends on another one, and the
schedule is an order in which all classes can run as one. Of several such sites one goes first to which
nothing can be added by waiting; there is none if two sites wait for each other, in different steps.
"""

from __future__ import annotations

import dataclasses
import heapq
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence

from torch import fx

from graphopt.ir.builder import Builder
from graphopt.ir.graph import Graph, is_pure, is_random
from graphopt.ir.many import Parts, Slot, acting, literals, part, slots, type_of
from graphopt.ir.ops.base import Op
from graphopt.ir.order import kept_in_order
from graphopt.ir.own_norms import form_of, own
from graphopt.ir.rewrite import describe
from graphopt.ir.rows import Form, form, rows_of
from graphopt.ir.value import Value


@dataclasses.dataclass(frozen=True, eq=False)
class Siblings:
    """Calls of one function, in order, and where their views hold what differs. `moves`: what they
    read may lie anywhere; `optional`: it is only for those that read them."""

    members: tuple[fx.Node, ...]
    data: frozenset[Slot]
    form: Form
    moves: bool
    optional: bool = False


@dataclasses.dataclass(frozen=True)
class Plan:
    """Classes of siblings in an order in which they can be computed, and why others are none, by the
    first of them."""

    classes: tuple[Siblings, ...]
    reasons: dict[fx.Node, str]


def find_siblings(graph: Graph) -> Plan:
    """All classes of siblings of a graph; time and memory are about linear in it."""
    return _Schedule(graph).plan()


@dataclasses.dataclass(eq=False)
class _Site:
    """Calls with one set of parameters: all, those that wait, and those that have not run."""

    members: list[fx.Node]
    slot: Slot
    form: Form
    waiting: list[fx.Node] = dataclasses.field(default_factory=list)
    left: int = 0  # bits of members that have not run


class _Schedule:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.builder = Builder(graph, graph.output)
        self.order = {node: position for position, node in enumerate(graph.nodes)}
        self.reasons: dict[fx.Node, str] = {}
        self.ops = dict(self._acting())
        self.sites: dict[fx.Node, _Site] = {}
        self._find_sites()
        self._bits: dict[fx.Node, int] = {}
        self._above = self._dependence()
        self.classes: list[Siblings] = []
        self.places: dict[fx.Node, tuple[Hashable, int]] = {}  # in what, and which
        self.done: set[fx.Node] = set()
        self._in_order = list(kept_in_order(graph))
        self._pinned = {node for pair in self._in_order for node in pair}

    def _acting(self) -> Iterator[tuple[fx.Node, Op]]:
        for node in self.graph.calls:
            if not self.graph.is_constant(node):
                op = acting(node, self.builder)
                if op is not None:
                    yield node, op

    # -- sites with parameters --------------------------------------------------------------------

    def _find_sites(self) -> None:
        alike: dict[tuple[Slot, Hashable], list[fx.Node]] = defaultdict(list)
        for node, op in self.ops.items():
            slot = rows_of(op)
            if slot is not None:
                given = slots(op)
                others = tuple((where, one.node) for where, one in given.items() if where != slot)
                alike[slot, (others, literals(op)[:-1])].append(node)
        for (slot, _), members in alike.items():
            if len(members) > 1:
                self._find_site(slot, members)

    def _find_site(self, slot: Slot, members: Sequence[fx.Node]) -> None:
        """Members of one size are a site; if there is no such, or no way to take them together, the
        first one gets a reason."""
        found = form(self.ops[members[0]], frozenset({slot}))
        impure = next((one for one in members if not is_pure(one)), None)
        if impure is not None and not isinstance(found, str):
            found = "it is random" if is_random(impure) else "it writes states"
        if isinstance(found, str):
            if found:
                self.reasons[members[0]] = found
            return
        types: dict[Hashable, list[fx.Node]] = defaultdict(list)
        for one in members:
            types[type_of(slots(self.ops[one])[slot])].append(one)
        if len(types) == len(members):
            sizes = [list(slots(self.ops[one])[slot].shape) for one in members[:2]]
            reason = f"it reads values of different sizes: {sizes[0]} and {sizes[1]}"
            self.reasons[members[0]] = reason
        for some in types.values():
            how = form(self.ops[some[0]], frozenset({slot}))
            if len(some) > 1 and isinstance(how, Form):
                self.sites.update(dict.fromkeys(some, _Site(some, slot, how)))

    def _dependence(self) -> dict[fx.Node, int]:
        """The members of sites that every node depends on, or is, as bits."""
        for node in self.sites:
            self._bits[node] = 1 << len(self._bits)
            self.sites[node].left |= self._bits[node]
        above: dict[fx.Node, int] = {}
        for node in self.graph.nodes:
            bits = self._bits.get(node, 0)
            for one in node.all_input_nodes:
                bits |= above[one]
            above[node] = bits
        return above

    # -- the schedule -----------------------------------------------------------------------------

    def plan(self) -> Plan:
        before: dict[fx.Node, int] = {}
        after: dict[fx.Node, list[fx.Node]] = defaultdict(list)
        for node in self.graph.calls:
            inputs = [one for one in node.all_input_nodes if one.op == "call_function"]
            before[node] = len(inputs)
            for one in inputs:
                after[one].append(node)
        for first, second in self._in_order:
            before[second] += 1
            after[first].append(second)
        ready = [(self.order[node], node) for node, count in before.items() if not count]
        heapq.heapify(ready)
        waiting: dict[_Site, None] = {}
        grown: dict[Hashable, list[fx.Node]] = {}

        def run(nodes: Iterable[fx.Node]) -> None:
            for node in nodes:
                self.done.add(node)
                for user in after[node]:
                    before[user] -= 1
                    if not before[user]:
                        heapq.heappush(ready, (self.order[user], user))

        while True:
            while ready:
                node = heapq.heappop(ready)[1]
                if (site := self.sites.get(node)) is not None:
                    site.waiting.append(node)
                    waiting[site] = None
                elif (key := self._key(node)) is not None:
                    grown.setdefault(key, []).append(node)
                else:
                    run([node])
            if grown:
                for some in grown.values():
                    self._grow(some)
                    run(some)
                grown.clear()
            elif waiting:
                site = self._next(list(waiting))
                del waiting[site]
                run(self._fire(site))
            else:
                break
        for site in dict.fromkeys(self.sites.values()):
            self._explain(site)
        return Plan(tuple(self.classes), self.reasons)

    def _next(self, sites: Sequence[_Site]) -> _Site:
        """A site to which nothing can be added by waiting; if there is none, one with most calls."""
        for site in sites:
            if all(self._waits(one, site) for one in site.members if self._bits[one] & site.left):
                return site
        return max(sites, key=lambda one: (len(one.waiting), -self.order[one.waiting[0]]))

    def _waits(self, node: fx.Node, site: _Site) -> bool:
        """Whether a call waits, or depends on one of its own siblings that has not run."""
        return node in site.waiting or bool(self._above[node] & site.left & ~self._bits[node])

    def _fire(self, site: _Site) -> list[fx.Node]:
        """Those that wait run: all parts of one value as one, others as one too."""
        some, site.waiting = site.waiting, []
        for one in some:
            site.left &= ~self._bits[one]
        apart: dict[Hashable, dict[int, fx.Node]] = defaultdict(dict)
        rest = []
        for node in some:
            source, place = self._place(slots(self.ops[node])[site.slot]) or (None, 0)
            if source is None or place in apart[source]:
                rest.append(node)
            else:
                apart[source][place] = node
        data = frozenset({site.slot})
        for found in apart.values():
            if _is_run(found):
                self._register(Siblings(_in_order(found), data, site.form, True))
            else:
                rest += found.values()
        if len(rest) > 1:
            members = tuple(sorted(rest, key=self.order.__getitem__))
            self._pull([slots(self.ops[one])[site.slot].node for one in members], set(members))
            self._register(Siblings(members, data, site.form, True))
        return some

    def _register(self, found: Siblings) -> None:
        """A class, and where what it computes and what it reads can be found as one."""
        self.classes.append(found)
        given = [slots(self.ops[one]) for one in found.members]
        for slot in found.data:
            values = tuple(one[slot].node for one in given)
            for place, node in enumerate(values):
                if not self.graph.is_constant(node):
                    self.places.setdefault(node, (values, place))
        for place, node in enumerate(found.members):
            self.places[node] = (found, place)

    # -- ops without parameters -------------------------------------------------------------------

    def _place(self, value: Value) -> tuple[Hashable, int] | None:
        """What a value is a part of, and which."""
        known = self.places.get(value.node)
        if known is None and not value.is_constant and (found := part(value)) is not None:
            known = self.places[value.node] = found
        return known

    def _key(self, node: fx.Node) -> Hashable | None:
        """What siblings of an op without parameters have in common; None if it can have none."""
        op = self.ops.get(node)
        if op is None or not is_pure(node):
            return None
        places = self._places(op)
        if len({place[1] for place in places.values() if place is not None}) != 1:
            return None
        data = frozenset(slot for slot, place in places.items() if place is not None) | own(op)
        how = form_of(op, data)
        if isinstance(how, str) or (how.flat and not how.either and self._copies(places.values())):
            return None
        reads = [
            (slot, type_of(one) if slot in own(op) else
             one.node if (place := places[slot]) is None else place[0])
            for slot, one in slots(op).items()
        ]  # fmt: skip
        return (*literals(op), *reads)

    def _places(self, op: Op) -> dict[Slot, tuple[Hashable, int] | None]:
        """What the tensors of an op are parts of, and which; parameters that may differ are of none."""
        given = slots(op).items()
        return {slot: None if slot in own(op) else self._place(one) for slot, one in given}

    def _copies(self, places: Iterable[tuple[Hashable, int] | None]) -> bool:
        """Whether the rows of parts of a value have to be copied to be one behind the other."""
        parts = (place[0] for place in places if place is not None)
        return any(isinstance(one, Parts) and not one.is_free for one in parts)

    def _grow(self, nodes: Sequence[fx.Node]) -> None:
        """A class of ops that read parts of the same, in the same order."""
        by_place: dict[int, fx.Node] = {}
        for node in nodes:
            places = self._places(self.ops[node])
            by_place.setdefault(next(filter(None, places.values()))[1], node)
        if len(by_place) == len(nodes) and _is_run(by_place):
            first = self.ops[nodes[0]]
            data = frozenset(slot for slot, place in places.items() if place is not None) | own(
                first
            )
            how = form_of(first, data)
            assert isinstance(how, Form)
            self._register(Siblings(_in_order(by_place), data, how, False))

    def _pull(self, nodes: Sequence[fx.Node], readers: set[fx.Node]) -> None:
        """A class of ops without parameters that only `readers` and what has not run yet read."""
        views = [self.ops.get(one) for one in nodes]
        first = views[0]
        if first is None or len(set(nodes)) < len(nodes) or not self._can_wait(nodes, readers):
            return
        given = [slots(one) for one in views if one is not None]
        if any(one is None or literals(one) != literals(first) for one in views):
            return
        if any(one.keys() != given[0].keys() for one in given):
            return
        data = frozenset(
            slot for slot, one in given[0].items() if any(two[slot] != one for two in given)
        )
        how = form(first, data)
        if len(data) != 1 or isinstance(how, str):
            return
        (slot,) = data
        values = [one[slot] for one in given]
        # A comparison is where a step ends: what it reads is larger than what it gives.
        if how.either and values[0].dtype.itemsize > first.out.dtype.itemsize:
            return
        if len({type_of(one) for one in values}) == 1:
            self._pull([one.node for one in values], set(nodes))
            self._register(Siblings(tuple(nodes), data, how, True, optional=True))

    def _can_wait(self, nodes: Sequence[fx.Node], readers: set[fx.Node]) -> bool:
        """Whether calls that have run can as well run now."""
        return not any(
            one in self.places or one in self.sites or one in self._pinned or not is_pure(one)
            or any(user in self.done and user not in readers for user in one.users)
            for one in nodes
        )  # fmt: skip

    # -- reasons ----------------------------------------------------------------------------------

    def _explain(self, site: _Site) -> None:
        """Why calls of a site are in no class."""
        alone = [one for one in site.members if one not in self.places]
        if not alone or len(site.members) < 2:
            return
        for later in site.members:
            for one in site.members:
                if one is not later and self._above[later] & self._bits[one]:
                    if one in alone or later in alone:
                        reads = slots(self.ops[later])[site.slot]
                        self.reasons[one] = (
                            f"its next call depends on its result, through {describe(reads)}"
                        )
                        return
        self.reasons[alone[0]] = (
            "its calls and those of others wait for each other in different orders"
        )


def _is_run(places: dict[int, fx.Node]) -> bool:
    """Whether there are several places, one behind the other."""
    return len(places) > 1 and max(places) - min(places) == len(places) - 1


def _in_order(places: dict[int, fx.Node]) -> tuple[fx.Node, ...]:
    return tuple(places[one] for one in sorted(places))
