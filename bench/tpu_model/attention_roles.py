# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which part of the compiled attention kernel is which: the schedule's tree, read as the kernel.

`roles` names every loop and region of the tree by what it holds (DMAs, loads, stores, products) and
by what it is inside, as an event of `bench.tpu_model.attention_trips.trips`. Anything that it does
not know is an error: a schedule of another structure must not be weighed with this kernel's trips.
"""

from __future__ import annotations

from collections.abc import Sequence

from bench.tpu_model import schedule as ts
from bench.tpu_model.attention_trips import (
    DECODE,
    END,
    FILL,
    FULL,
    MULTIPLE,
    PREFILL,
    SINGLE,
    part_name,
)

# (place, event), as in `trips`; these events are the kernel's own and not counted there.
CALL = (END, "call")
LOOP = (END, "loop")  # one trip an iteration, or a run of iterations of full blocks
DECODES = (END, "decodes")  # the trips that are a decode's
MIXED = (END, "mixed")  # those of them that are not of full blocks
NEVER = (END, "never")
Role = tuple[str, str]
_MOST_DELAY_SLOTS = max(g.branch_delay_slots for g in ts.GENERATIONS.values())
Roles = dict[tuple[int, ...], Role]


def roles(tree: ts.Node) -> Roles:
    """Path -> role of every node.

    Raises:
      ValueError: the tree is not the kernel's, as far as it is known here.
    """
    try:
        return _kernel(tree)
    except _UnknownError as e:
        raise ValueError(f"{e}; the schedule is\n{ts.describe(tree)}") from None


class _UnknownError(Exception):
    """A node that is not what the kernel has there."""


def _loop(node: ts.Node) -> ts.Node | None:
    """The loop that a node is, or that it only guards."""
    if node.kind == "loop":
        return node
    # The delay slots of the loop's branch may be the region's own.
    is_guard = node.own.bundles <= _MOST_DELAY_SLOTS and len(node.children) == 1
    return node.children[0] if is_guard and node.children[0].kind == "loop" else None


def _form(node: ts.Node) -> str:
    """What a node is by what is in it, wherever it stands; "" if only its place tells."""
    own, loop = node.own, _loop(node)
    if loop is not None:
        if loop.children:
            return "run" if loop.own.slots.get("MATMUL") else ""
        held = loop.own
        moves = held.vector_loads + held.vector_stores
        if held.dma_issues:
            return "" if moves else "send" if held.dma_waits else "chunks"
        if not moves:
            return "search"
        return "" if not held.vector_stores else "rows" if held.vector_loads else "clear"
    inside = [_form(child) for child in node.children]
    if own.slots.get("MATMUL"):
        return "products"
    if inside == ["rows"] and own.vector_stores and not own.dma_issues:
        return "make"
    if not own.dma_issues and not own.vector_stores:
        if inside == ["run"]:  # what it carries is spilled before it
            return "run"
        if inside == ["again"]:  # on a condition of its own
            return "again"
        if own.dma_waits:
            return {"chunks": "again", "find": "next"}.get(" ".join(inside), "")
        if inside == ["search"]:
            return "find"
        if inside and set(inside) == {"find"}:
            return "finds"
        if inside == ["rows"]:
            return "gather"
        if inside == ["open"]:
            return "first"
    if inside == ["gather"] and own.dma_issues:
        return "close"
    if inside == ["send"] and own.vector_stores:
        return "zero"
    if inside[:2] == ["close", "zero"] and own.dma_issues and own.dma_waits:
        return "open"
    if not inside and own.vector_loads and not own.dma_issues:
        return "straight"
    return ""


def _expect(node: ts.Node, found: Sequence[str], *wanted: Sequence[str]) -> None:
    if list(found) not in [list(w) for w in wanted]:
        raise _UnknownError(
            f"{node.kind} {node.path or '-'} holds {list(found)}, wanted {list(wanted[0])}"
        )


def _looped(node: ts.Node, entered: Role, trips: Role) -> Roles:
    """A loop and the region that guards it, if there is one."""
    loop = _loop(node)
    assert loop is not None
    return {node.path: entered} | {loop.path: trips}


def _kernel(tree: ts.Node) -> Roles:
    if len(tree.children) == 1 and tree.children[0].kind == "branch":
        # Of a v5p's two cores one runs the kernel.
        return {tree.path: CALL} | _kernel(tree.children[0])
    forms = [_form(child) for child in tree.children]
    _expect(tree, forms, ["", "", "close", "zero"])
    fill, guard, close, zero = tree.children
    loop = _loop(guard)
    if fill.kind != "loop" or loop is None or len(loop.children) != 2:
        raise _UnknownError(
            "the kernel is not a loop that fills the stages and a loop over two forms"
        )
    decode, prefill = loop.children
    return (
        {tree.path: CALL, fill.path: (FILL, "iteration"), guard.path: CALL, loop.path: LOOP}
        | _fill(fill)
        | _decodes(decode)
        | _prefill(prefill)
        | _close(close, END)
        | _zero(zero, END)
    )


def _fill(fill: ts.Node) -> Roles:
    _expect(fill, [_form(child) for child in fill.children], ["find"], ["find", "chunks"])
    find, *loops = fill.children  # without one the DMAs are written out
    found = _find(find, FILL, 0)
    for chunks in loops:
        found |= _looped(chunks, (FILL, "fetch0"), (FILL, "chunks0"))
    return found


def _find(node: ts.Node, place: str, b: int | str) -> Roles:
    search = _looped(node.children[0], (place, f"skip{b}"), (place, f"skip_trips{b}"))
    return {node.path: (place, f"find{b}")} | search


def _close(node: ts.Node, place: str) -> Roles:
    (gather,) = node.children
    loop = _looped(gather.children[0], (place, "gather"), (place, "gather_trips"))
    return {node.path: (place, "close"), gather.path: (place, "gather")} | loop


def _zero(node: ts.Node, place: str) -> Roles:
    loop = _looped(node.children[0], (place, "zero"), (place, "zero_trips"))
    return {node.path: (place, "zero")} | loop


def _open(node: ts.Node, place: str) -> Roles:
    """A new q tile; where keeping a tile is short, the compiler predicates it."""
    forms = [_form(child) for child in node.children]
    tail = [] if place == PREFILL else ["rows"]
    writing = ["make", "chunks"] if place == PREFILL else ["rows", "rows"]
    _expect(
        node,
        forms,
        ["close", "zero", "straight", *tail],
        ["close", "zero", *tail],
        ["close", "zero", "straight", *writing],
        ["close", "zero", *writing],
    )
    found = {node.path: (place, "open")}
    found |= _close(node.children[0], place) | _zero(node.children[1], place)
    for child, form in list(zip(node.children, forms, strict=True))[2:]:
        if form == "rows":  # the queries, then the new tokens
            found |= _looped(child, (place, "open"), (place, "tiles"))
        elif form == "make":
            found[child.path] = (place, "make")
            found |= _looped(child.children[0], (place, "make"), (place, "make_trips"))
        elif form == "chunks":
            found |= _looped(child, (place, "send"), (place, "send_trips"))
        else:
            found[child.path] = (place, "keep")
    return found


def _decodes(node: ts.Node) -> Roles:
    """The decodes' side of the loop: a q tile, then one of the iterations."""
    if _form(node) == "products":  # one block at a time: the iteration is the region itself
        return _first(node.children[0]) | _decode(node, SINGLE, node.children[1:])
    _expect(
        node,
        [_form(child) for child in node.children],
        ["first", "run", ""],
        ["open", "run", ""],
    )
    first, full, mixed = node.children
    iteration = full if full.kind == "loop" else full.children[0]
    _expect(mixed, [_form(child) for child in mixed.children], ["products", "products"])
    multiple, single = mixed.children
    return (
        {node.path: DECODES, mixed.path: MIXED}
        | _first(first)
        | {full.path: (FULL, "run")}
        | _decode(iteration, FULL, iteration.children)
        | _decode(multiple, MULTIPLE, multiple.children)
        | _decode(single, SINGLE, single.children)
    )


def _first(node: ts.Node) -> Roles:
    """A decode's q tile, where its first KV block opens one."""
    if _form(node) == "open":
        return _open(node, DECODE)
    _expect(node, [_form(node)], ["first"])
    return {node.path: (DECODE, "first")} | _open(node.children[0], DECODE)


def _decode(node: ts.Node, place: str, children: Sequence[ts.Node]) -> Roles:
    """A iteration of decodes: its children find and fetch blocks."""
    forms = [_form(child) for child in children]
    chunks = ["chunks"] * forms.count("chunks")
    found = {node.path: (place, "iteration")}
    if place == SINGLE:
        _expect(node, forms, ["find", *chunks])
        find, *loops = children
        found |= _find(find, place, 0)
    else:
        parts = forms.count("finds")
        _expect(node, forms, ["find", "finds"] * max(1, parts) + chunks)
        searches, loops = list(children[: 2 * parts]), list(children[2 * parts :])
        b = 0
        for part, (find, fetch) in enumerate(zip(searches[::2], searches[1::2], strict=True)):
            found |= _find(find, place, part_name(part))
            found |= {fetch.path: (place, f"slow{part_name(part)}")}
            for one in fetch.children:
                found |= _find(one, place, b)
                b += 1
    for b, loop in enumerate(loops):
        found |= _looped(loop, (place, f"fetch{b}"), (place, f"chunks{b}"))
    return found


def _prefill(node: ts.Node) -> Roles:
    forms = [_form(child) for child in node.children]
    wanted = ["open", "again", "next", "products", "products", "straight", "straight", ""]
    _expect(node, forms, wanted)
    start, again, ahead, masked, unmasked, sound, finish, repeat = node.children
    if masked.own.bundles < unmasked.own.bundles:
        raise _UnknownError(
            f"the prefill at {node.path} has no iteration with a mask and one without"
        )
    found = {node.path: (PREFILL, "iteration")} | _open(start, PREFILL)
    for never in (again, repeat):
        found |= dict.fromkeys((n.path for n in never.walk()), NEVER)
    found |= {ahead.path: (PREFILL, "iteration")} | _find(ahead.children[0], PREFILL, 0)
    for iteration, event in ((masked, "masked"), (unmasked, "unmasked")):
        found[iteration.path] = (PREFILL, event)
        forms = [_form(child) for child in iteration.children]
        clears = ["clear"] * (iteration is masked)
        _expect(iteration, forms, clears, [*clears, "chunks"])
        for loop, form in zip(iteration.children, forms, strict=True):
            names = ("clear", "clear_trips") if form == "clear" else ("fetch", "chunks")
            entered, trips = (f"{event}_{name}" for name in names)
            found |= _looped(loop, (PREFILL, entered), (PREFILL, trips))
    return found | {sound.path: (PREFILL, "last"), finish.path: (PREFILL, "last")}
