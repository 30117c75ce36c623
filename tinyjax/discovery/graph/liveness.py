"""What of a graph matters: what the loss is computed from, and how leaves that it does not read get new values."""

from collections.abc import Collection, Iterable, Sequence

from tinyjax.discovery.graph.graph import Graph, Op, Value


def behind_loss(graph: Graph) -> set[Value]:
    """The values the loss is computed from (auxiliary outputs are not)."""
    return _behind(graph.ops, [graph.loss])


def alive(graph: Graph, aux: Sequence[Value]) -> Graph:
    """The graph without what nothing depends on that counts: metrics, statistics that are printed, callbacks.

    Besides the loss count new values of leaves that the loss does not read (running statistics, returned beside it in
    the shape of the leaf). A leaf that even those do not read keeps every auxiliary output that is computed from it:
    what meets it has to follow its axes.
    """
    wanted = [graph.loss]
    leaves = _unread(graph, wanted)
    reached = _computed_from(graph.ops, leaves)
    shapes = {(leaf.shape, leaf.dtype) for leaf in leaves}
    wanted += [v for v in aux if v in reached and (v.shape, v.dtype) in shapes]
    reached = _computed_from(graph.ops, _unread(graph, wanted))
    wanted += [v for v in aux if v in reached]
    needed = _behind(graph.ops, wanted)
    return graph._replace(ops=tuple(op for op in graph.ops if any(v in needed for v in op.outs)))


def _unread(graph: Graph, wanted: Iterable[Value]) -> list[Value]:
    """The leaves that some values are not computed from."""
    needed = _behind(graph.ops, wanted)
    return [leaf for leaf in graph.params if leaf not in needed]


def _behind(ops: Sequence[Op], wanted: Iterable[Value]) -> set[Value]:
    """What some values are computed from, themselves included; every operation is looked at once."""
    makers = {v: op for op in ops for v in op.outs}
    # What enters a step of a scan was left by the step before: it is made by the operation that closes the loop, too.
    closing = {op.ins[1]: op for op in ops if _closes_loop(op)}
    needed: set[Value] = set()
    queue, seen = list(wanted), set[Op]()
    while queue:
        value = queue.pop()
        if value in needed:
            continue
        needed.add(value)
        for op in (makers.get(value), closing.get(value)):
            if op is not None and op not in seen:
                seen.add(op)
                queue += (*op.ins, *op.outs, *op.chosen_by)
    return needed


def _computed_from(ops: Sequence[Op], sources: Collection[Value]) -> set[Value]:
    """What is computed from some values, themselves included; every operation is looked at once for each operand."""
    readers: dict[Value, list[Op]] = {}
    for op in ops:
        for v in (*op.ins, *op.chosen_by):
            readers.setdefault(v, []).append(op)
    reached: set[Value] = set()
    queue = list(sources)
    while queue:
        value = queue.pop()
        if value in reached:
            continue
        reached.add(value)
        for op in readers.get(value, ()):
            queue += (*op.outs, op.ins[1]) if _closes_loop(op) else op.outs
    return reached


def _closes_loop(op: Op) -> bool:
    """Whether an operation leaves a scan with a carry: its operands are what a step returns, and what entered it."""
    return op.name == "scan_carry" and len(op.ins) == 2
