"""Cuts a primitive graph into regions.

Families (specialised generators) choose first. Then, in graph order, every pointwise op and
reduction starts as a group of its own and joins the groups of its producers, the latest first, where

- one kernel can compute both (`lower` builds it, or says why not): one domain of points, reductions
  over the same axes, no value stored in an order that is not its own;
- nothing outside would have to run in between (groups stay convex).

Then products take in the pointwise group that alone reads them, and small ones that they alone read.

A smaller or larger producer (one that is broadcast or sliced) joins only if nothing else reads it, for
it is then recomputed where it is needed and never stored.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import fx

from graphopt.backends.triton import families, kinds, loops
from graphopt.backends.triton.generated import Generated, Multiplied, word
from graphopt.backends.triton.index import equal, product, weight
from graphopt.backends.triton.lower import Domain, Lowering, domain_of, identifier
from graphopt.backends.triton.region import Outside, Region
from graphopt.backends.triton.views import origin

# Modules of `families`, in the order in which they choose. Each has `match(graph)`, which gives its
# regions, and the nodes that came near with the reason why they are none.
FAMILIES = ["scan", "grouped", "linear_attention"]

MOST_NODES = 96  # of one kernel
MOST_TENSORS = 24
LEAST_SCAN = 8  # ops of a recurrence: one of a few ops is an ordinary chain
MOST_BEFORE = 8  # ops in front of a product, computed again for every tile

Made = TypeVar("Made")


class Group:
    """Nodes that become one kernel over one domain."""

    def __init__(self, nodes: Sequence[fx.Node], domain: Domain) -> None:
        self.nodes = list(nodes)
        self.domain = domain


def partition(graph: fx.Graph, reasons: dict[fx.Node, str], notes: list[str]) -> list[Region]:
    """The regions of a primitive graph, in no particular order; no node is in two of them.

    `reasons` gets an entry for every pointwise op and reduction that is in none, `notes` one for
    every exception that is no refusal: its region is left to the framework, the others are not.
    """
    return _Partition(graph, reasons, notes).run()


class _Partition:
    def __init__(self, graph: fx.Graph, reasons: dict[fx.Node, str], notes: list[str]) -> None:
        self.graph = graph
        self.reasons = reasons
        self.notes = notes
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        self.group: dict[fx.Node, Group] = {}
        self.taken: dict[fx.Node, Region] = {}
        self.names: set[str] = set()

    def run(self) -> list[Region]:
        regions: list[Region] = []
        for family in FAMILIES:
            regions += self._of_family(family)
        for node in self.graph.nodes:
            if node.meta.get("kind") in ("pointwise", "reduction") and node not in self.taken:
                self._start(node)
        regions += self._around_products()
        for group in dict.fromkeys(self.group.values()):
            regions += self._region(group)
        return regions

    def _tried(self, what: str, build: Callable[[], Made]) -> tuple[Made | None, str]:
        """What `build` makes, or why it does not."""
        try:
            return build(), ""
        except Outside as refusal:
            return None, str(refusal)
        except Exception as error:  # a fault of ours: this region alone does without a kernel
            said = (str(error).strip().splitlines() or [""])[0]
            self.notes.append(f"{what}: no kernel: {type(error).__name__}: {said}")
            return None, self.notes[-1]

    # -- families -----------------------------------------------------------------------------

    def _of_family(self, family: str) -> Iterator[Region]:
        home = importlib.import_module(f"{families.__name__}.{family}")
        found, _ = self._tried(f"family {family}", lambda: home.match(self.graph))
        for region in found.regions if found else ():
            reason = self._declined(region)
            if reason:
                self.reasons.update(dict.fromkeys(region.nodes, reason))
                continue
            self.names.add(region.name)
            self.taken.update(dict.fromkeys(region.nodes, region))
            yield region
        for node, reason in found.reasons if found else ():
            self.reasons.setdefault(node, reason)

    def _declined(self, region: Region) -> str:
        """Why a family's region is not used; empty if it is."""
        if any(node in self.taken for node in region.nodes):
            return "another family computes a part of it"
        if region.kind == "scan" and len(region.nodes) < LEAST_SCAN:
            return f"a recurrence of fewer than {LEAST_SCAN} ops is an ordinary chain"
        return self._tried(region.name, lambda: (region.source, region.launcher()))[1]

    # -- products -----------------------------------------------------------------------------

    def _around_products(self) -> Iterator[Region]:
        """Products with the pointwise groups next to them. A group that reduces stays apart."""
        for node in self.graph.nodes:
            if node.meta.get("kind") == "product" and node not in self.taken:
                region = self._around(node)
                if region is not None:
                    yield region

    def _around(self, product: fx.Node) -> Region | None:
        readers = {self.group.get(one) for one in self.consumers(product)}
        after = readers.pop() if len(readers) == 1 else None
        before = [
            group for one in self.producers(product) if (group := self.group.get(one))
            and all(user is product or user in group.nodes
                    for inner in group.nodes for user in self.consumers(inner))
        ]  # fmt: skip
        best: Multiplied | None = None
        joined: list[Group] = []
        for group in [after, *dict.fromkeys(before)]:
            if group is None or group.domain.reduced:
                continue
            if group is not after and len(group.nodes) > MOST_BEFORE:
                continue
            nodes = [one for each in (*joined, group) for one in each.nodes]
            nodes = sorted([product, *nodes], key=self.order.__getitem__)
            outputs = sorted(self.outputs(nodes), key=self.order.__getitem__)
            found, reason = self._tried(
                product.name,
                lambda nodes=nodes, outputs=outputs: Multiplied.around(  # type: ignore[misc]
                    "trial", product, nodes, outputs
                ),
            )
            if found is None:
                self.reasons[product] = reason
            else:
                best = found
                joined.append(group)
        if best is None:
            self.reasons.setdefault(product, "nothing pointwise to compute with it")
            return None
        self.reasons.pop(product, None)
        best = dataclasses.replace(best, name=self._name(best.nodes))
        for group in joined:
            for node in group.nodes:
                del self.group[node]
        self.taken.update(dict.fromkeys(best.nodes, best))
        return best

    # -- the graph through its views ----------------------------------------------------------

    def consumers(self, node: fx.Node) -> Iterable[fx.Node]:
        """Who reads a node, views looked through."""
        for user in node.users:
            if user.meta.get("kind") == "view":
                yield from self.consumers(user)
            else:
                yield user

    def producers(self, node: fx.Node) -> list[fx.Node]:
        found = [origin(one) for one in node.all_input_nodes if kinds.is_tensor(one)]
        return list(dict.fromkeys(found))

    def outputs(self, members: Iterable[fx.Node]) -> list[fx.Node]:
        """The members that something else reads."""
        inside = set(members)
        return [node for node in inside if any(one not in inside for one in self.consumers(node))]

    # -- growing groups -----------------------------------------------------------------------

    def _start(self, node: fx.Node) -> None:
        group = Group([node], domain_of(node))
        alone, reason = self._tried(node.name, lambda: self._lowered([node], group.domain))
        if alone is None:
            self._leave([node], reason)
            return
        self.group[node] = group
        refused: set[Group] = set()
        while (other := self._candidate(group, refused)) is not None:
            domain = self._fits(other, group)
            if domain is None:
                refused.add(other)
                continue
            group = Group(sorted([*other.nodes, *group.nodes], key=self.order.__getitem__), domain)
            self.group.update(dict.fromkeys(group.nodes, group))

    def _candidate(self, group: Group, refused: set[Group]) -> Group | None:
        """The group of the latest producer that was not tried yet."""
        found = {
            self.group[one] for node in group.nodes for one in self.producers(node)
            if one in self.group
        } - refused - {group}  # fmt: skip
        return max(found, key=lambda one: self.order[one.nodes[-1]], default=None)

    def _fits(self, producer: Group, consumer: Group) -> Domain | None:
        """The domain on which two groups are one kernel; None if there is none."""
        members = [*producer.nodes, *consumer.nodes]
        if len(members) > MOST_NODES or not self._convex(producer, consumer):
            return None
        domains = [consumer.domain, producer.domain]
        if producer.domain.reduced and not consumer.domain.reduced:
            domains = [producer.domain]
        elif consumer.domain.reduced and not producer.domain.reduced:
            domains = [consumer.domain]
        before = self._awkward(producer) + self._awkward(consumer)
        for domain in domains:
            kernel, _ = self._tried(
                f"{members[0].name} to {members[-1].name}",
                lambda domain=domain: self._lowered(members, domain),  # type: ignore[misc]
            )
            if (
                kernel is not None
                and len(kernel.inputs) + len(kernel.stores) <= MOST_TENSORS
                and _divisions(kernel) <= before
            ):
                return domain
        return None

    def _lowered(self, members: Sequence[fx.Node], domain: Domain) -> loops.Kernel:
        lowering = Lowering(members, domain)
        return lowering.kernel("trial", sorted(self.outputs(members), key=self.order.__getitem__))

    def _awkward(self, group: Group) -> int:
        return _divisions(self._lowered(group.nodes, group.domain))

    def _convex(self, producer: Group, consumer: Group) -> bool:
        """Whether no path from the producer to the consumer leads through anything else."""
        inside, goal = set(producer.nodes), set(consumer.nodes)
        seen: set[fx.Node] = set()
        stack = [
            one for node in producer.nodes for one in self.consumers(node)
            if one not in inside and one not in goal
        ]  # fmt: skip
        last = self.order[consumer.nodes[-1]]
        while stack:
            node = stack.pop()
            if node in seen:
                continue
            if node in goal:
                return False
            together = self._together(node)
            seen.update(together)
            for one in together:
                if self.order[one] <= last:
                    stack += [user for user in self.consumers(one) if user not in seen]
        return True

    def _together(self, node: fx.Node) -> Sequence[fx.Node]:
        """The nodes that run in the same kernel."""
        if node in self.group:
            return self.group[node].nodes
        return self.taken[node].nodes if node in self.taken else [node]

    # -- regions ------------------------------------------------------------------------------

    def _region(self, group: Group) -> Iterator[Region]:
        """The region of a group, its source printed: what cannot be is known now."""
        outputs = sorted(self.outputs(group.nodes), key=self.order.__getitem__)
        name = self._name(group.nodes)
        region, reason = self._tried(
            name, lambda: Generated.of(name, group.nodes, outputs, group.domain)
        )
        if region is None:
            self._leave(group.nodes, reason)
        else:
            yield region

    def _leave(self, nodes: Iterable[fx.Node], reason: str) -> None:
        """Leave nodes to the framework."""
        for node in nodes:
            self.reasons[node] = reason
            node.meta["kind"] = "external"

    def _name(self, nodes: Sequence[fx.Node]) -> str:
        """The ops of the source graph, in order: add_layer_norm."""
        words = dict.fromkeys(word(node) for node in nodes)
        wish = name = identifier("_".join(list(words)[:4]))
        count = 1
        while name in self.names:
            name, count = f"{wish}_{count}", count + 1
        self.names.add(name)
        return name


def _divisions(kernel: loops.Kernel) -> int:
    """How many accesses to whole tensors need a division: they are out of their order."""
    points = product([kernel.row_count, kernel.column_count])
    return sum(
        weight(one.offset) > 0 and equal(product(one.buffer.shape), points)
        for one in kernel.expressions() if isinstance(one, loops.Load)
    )  # fmt: skip
