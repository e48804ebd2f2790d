# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Predict a Pallas TPU kernel's cycles from the schedule that libtpu compiles on a CPU.

A TensorCore issues one VLIW bundle a cycle unless it stalls, so the bundles of the final schedule,
each times how often it runs, are the cycles that issuing takes. `schedules` compiles jobs and
reads each kernel into a tree of loops and skippable regions; `executed` weighs that tree with trip
counts and branch probabilities that the caller knows.

What a prediction rests on: the clock and bandwidth in `GENERATIONS`. What it leaves out: waiting
for a DMA, DMA latency and descriptor rate, memory bank conflicts, instruction fetch, and both
cores of a chip competing for HBM. `bench.tpu_model.published` says what that is worth against
published times. Predicated instructions count as executed.

Print the tree of any job:

    python -m bench.tpu_model.schedule MODULE:FUNCTION v6e '{"keyword": "value"}'
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from bench.tpu_model.compile import (  # noqa: F401 - one import serves the callers of this module
    COMPILE_ENV,
    TOPOLOGIES,
    Dump,
    Job,
    aot_compile,
    compile_jobs,
    mesh_of,
)


@dataclasses.dataclass(frozen=True)
class Generation:
    """One TensorCore of a TPU generation.

    HBM, VMEM and SMEM are jax's own figures, per core (`pltpu.get_tpu_info()`; a test compares
    them). The clock is jax's peak bf16 rate per core over the flop per cycle that a compiled
    matrix product shows (131072 on v4, v5e, v5p; 524288 on v6e, tpu7x; a test compares them too).

    Attributes:
      clock_ghz: bundles per nanosecond.
      hbm_gb_per_s: peak HBM bandwidth of the core, 1e9 bytes a second. A v4 or v5p chip has twice
        this and is programmed as one device with two cores; a tpu7x chip is two devices.
      vmem_bytes: VMEM of the core.
      branch_delay_slots: bundles after a branch that run whether it is taken or not; read off
        libtpu's dumps, which close the branch's region that many bundles after it.
    """

    clock_ghz: float
    hbm_gb_per_s: float
    vmem_bytes: int
    branch_delay_slots: int


_MIB = 2**20
GENERATIONS = {
    "v4": Generation(1.049, 615.0, 16 * _MIB, 1),
    "v5e": Generation(1.503, 820.0, 128 * _MIB, 4),
    "v5p": Generation(1.751, 1230.0, 64 * _MIB, 4),
    "v6e": Generation(1.75, 1640.0, 128 * _MIB, 4),
    "tpu7x": Generation(2.20, 3700.0, 64 * _MIB, 6),
}


def hbm_cycles(num_bytes: float, generation: str) -> float:
    """Cycles that HBM needs at peak bandwidth to read or to write `num_bytes`."""
    g = GENERATIONS[generation]
    return num_bytes / g.hbm_gb_per_s * g.clock_ghz


def microseconds(cycles: float, generation: str) -> float:
    """Cycles as microseconds at the generation's clock."""
    return cycles / GENERATIONS[generation].clock_ghz * 1e-3


@dataclasses.dataclass(frozen=True)
class Counts:
    """What a stretch of schedule holds; fractions once weighted by `executed`.

    Attributes:
      bundles: VLIW bundles: cycles, if nothing stalls.
      empty: bundles without an instruction (a latency that nothing hides).
      dma_waits: waits for a DMA.
      bounds_checks: halts that guard a DMA's address (off with `disable_bounds_checks`).
      vector_loads: vector loads from VMEM, refills of spilled registers included.
      vector_stores: vector stores, spills included.
      scalar_spills: scalar spills and refills.
      dmas: DMAs issued, by direction: `{"vmem_to_hbm": 8}`; `general` is HBM to HBM.
      slots: issue slots used, by libtpu's names (VALU, SALU, VLOAD, VLOAD:FILL, ...); MATMUL is
        occupancy of the unit and not instructions.
    """

    bundles: float = 0
    empty: float = 0
    dma_waits: float = 0
    bounds_checks: float = 0
    vector_loads: float = 0
    vector_stores: float = 0
    scalar_spills: float = 0
    dmas: Mapping[str, float] = dataclasses.field(default_factory=dict)
    slots: Mapping[str, float] = dataclasses.field(default_factory=dict)

    @property
    def dma_issues(self) -> float:
        """DMAs issued, all directions."""
        return sum(self.dmas.values())


def weighted_sum(parts: Iterable[tuple[Counts, float]]) -> Counts:
    """Sum of counts, each times its weight."""
    totals: dict = {f.name: 0 for f in dataclasses.fields(Counts)}
    totals |= {"dmas": collections.Counter(), "slots": collections.Counter()}
    for counts, weight in parts:
        for name, total in totals.items():
            value = getattr(counts, name)
            if isinstance(value, Mapping):
                for key, count in value.items():
                    total[key] += count * weight
            else:
                totals[name] = total + value * weight
    return Counts(**totals | {"dmas": dict(totals["dmas"]), "slots": dict(totals["slots"])})


@dataclasses.dataclass(frozen=True)
class Node:
    """A kernel, a loop in it, or a region that a branch can skip.

    An `if` with an `else` is two regions side by side. Every bundle from `first` to `last` is
    counted once: in `own`, or in one of the children.

    Attributes:
      kind: "kernel", "loop" or "branch".
      path: which child of which child of the kernel, from 0; () is the kernel.
      first: first bundle.
      last: last bundle, a branch's delay slots included.
      own: counts of the bundles in no child.
      children: loops and regions directly inside, in order.
      skip_if: of a branch, the predicate register that skips it ("" is always).
    """

    kind: str
    path: tuple[int, ...]
    first: int
    last: int
    own: Counts
    children: tuple[Node, ...] = ()
    skip_if: str = ""

    @property
    def total(self) -> Counts:
        """Counts of every bundle from first to last, each once."""
        return weighted_sum((node.own, 1) for node in self.walk())

    @property
    def is_leaf(self) -> bool:
        """Whether no loop is inside."""
        return not any(node.kind == "loop" for node in self.walk() if node is not self)

    def walk(self) -> Iterator[Node]:
        """This node and everything inside, outermost first."""
        yield self
        for child in self.children:
            yield from child.walk()


@dataclasses.dataclass(frozen=True)
class Operand:
    """Where libtpu put an operand of a kernel: a kernel timed with an operand in VMEM is another
    kernel (its "DMA" is a copy loop), so callers check what they meant to have in HBM.

    Attributes:
      space: "hbm", "vmem", "smem", ...
      shape: as in the compiled module, "bf16[64,16,8,128]".
      kind: "input" or "output".
    """

    space: str
    shape: str
    kind: str


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The schedule of one kernel (or of a fusion that XLA made beside it).

    Attributes:
      name: `name=` of the pallas_call and a number: "page_write.1".
      tree: the whole kernel.
      operands: inputs and outputs; an aliased pool is listed as both.
      capacity: slots of each kind in a bundle.
      bundles: counts of each bundle, in order; a node is `bundles[node.first : node.last + 1]`.
    """

    name: str
    tree: Node
    operands: tuple[Operand, ...]
    capacity: Mapping[str, int]
    bundles: tuple[Counts, ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Everything compiled for one job.

    Attributes:
      job: the job.
      kernels: Pallas kernels and XLA's own fusions and copies, in the order of compilation.
      hlo: text of the compiled module.
    """

    job: Job
    kernels: tuple[Kernel, ...]
    hlo: str

    def kernel(self, name: str) -> Kernel:
        """The only kernel whose pallas_call has this `name=`.

        Raises:
          ValueError: there is none, or there are several.
        """
        found = [k for k in self.kernels if re.fullmatch(re.escape(name) + r"(\.\d+)?", k.name)]
        if len(found) != 1:
            raise ValueError(
                f"{self.job.name}: {len(found)} kernels are named {name!r}, want 1; there are"
                f" {[k.name for k in self.kernels]}"
            )
        return found[0]


def schedules(
    jobs: Sequence[Job], *, on_done: Callable[[Job, float], None] | None = None
) -> list[Schedule]:
    """Compiles jobs in a child process and reads their schedules: see `compile_jobs`."""
    return [read_dump(dump) for dump in compile_jobs(jobs, on_done=on_done)]


# --- cost -------------------------------------------------------------------------------------


def executed(
    tree: Node,
    *,
    loops: Sequence[tuple[Callable[[Node], bool], float]] = (),
    branches: Sequence[tuple[Callable[[Node], bool], float]] = (),
    other_branches: float = 1.0,
) -> Counts:
    """Counts of a whole call: every node's own counts times how often the node runs.

    `.bundles` of the result are the predicted cycles. Check `.dma_issues` against the DMAs that
    the call is known to issue: a wrong trip count shows there.

    Args:
      tree: the kernel.
      loops: (predicate, trips each time the loop is entered); every loop must match exactly one.
      branches: (predicate, probability that the region runs when it is reached); a region may
        match one at most.
      other_branches: probability for the regions that match none; 1 is the upper bound.

    Raises:
      ValueError: a loop matches none or several, a branch several, or a predicate nothing.
    """
    rules = {"loop": list(loops), "branch": list(branches)}
    used: set[tuple[str, int]] = set()

    def times(node: Node) -> float:
        hits = [i for i, (match, _) in enumerate(rules[node.kind]) if match(node)]
        if len(hits) > 1 or (not hits and node.kind == "loop"):
            raise ValueError(
                f"executed: {len(hits)} of the {len(rules[node.kind])} {node.kind} predicates"
                f" match {_line(node).strip()}; want 1. The schedule is\n{describe(tree)}"
            )
        used.update((node.kind, i) for i in hits)
        return rules[node.kind][hits[0]][1] if hits else other_branches

    def weigh(node: Node, runs: float) -> Iterator[tuple[Counts, float]]:
        yield node.own, runs
        for child in node.children:
            yield from weigh(child, runs * times(child))

    result = weighted_sum(weigh(tree, 1.0))
    for kind, rows in rules.items():
        idle = [i for i in range(len(rows)) if (kind, i) not in used]
        if idle:
            raise ValueError(
                f"executed: {kind} predicate {idle[0]} matches nothing in\n{describe(tree)}"
            )
    return result


def at(*path: int) -> Callable[[Node], bool]:
    """Predicate: the node at this path, as `describe` prints it."""
    return lambda node: node.path == path


def describe(tree: Node, *, min_bundles: int = 1) -> str:
    """The tree as text, one line a node, for a reader who writes predicates.

    Args:
      tree: the node to start from.
      min_bundles: leave out smaller loops and regions.
    """
    return "\n".join(_line(node) for node in tree.walk() if _bundles(node) >= min_bundles)


def _bundles(node: Node) -> int:
    return node.last - node.first + 1


def _line(node: Node) -> str:
    total = node.total
    dmas = " ".join(f"{direction}={count:g}" for direction, count in sorted(total.dmas.items()))
    path = ".".join(map(str, node.path)) or "-"
    note = f"skipped if {node.skip_if or 'reached'}" if node.kind == "branch" else ""
    return (
        f"{'  ' * len(node.path)}{node.kind} {path} [{node.first:#x}..{node.last:#x}]"
        f" bundles={_bundles(node)} own={node.own.bundles:g} empty={total.empty:g}"
        f" dma=({dmas}) wait={total.dma_waits:g} checks={total.bounds_checks:g}"
        f" vld={total.vector_loads:g} vst={total.vector_stores:g}"
        f" spill={total.slots.get('VSTORE:SPILL', 0):g}v+{total.scalar_spills:g}s {note}"
    ).rstrip()


# --- reading a dump ---------------------------------------------------------------------------

# "  0x1d PF: > { %s14 = sadd.s32 1, %s245  ;;  ... } /* End region 3 */"; comments span lines.
_BUNDLE = re.compile(r"^ *(0x[0-9a-f]+|0) +[A-Z: ]*: *>* *\{", re.MULTILINE)
_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)
_BRANCH = re.compile(r"\bsbr\.\w+(?: \((!?%p\w+)\))? target bundleno = (\d+)")
_OPCODE = re.compile(r"(?:%\S+ = )?([a-z][\w.]*)")
_OPERAND = re.compile(r"inlined_call_operand\.([^ \[]+) \[shape: ([^ ]+), .*?kind: (\w+)")
_FILE = re.compile(r"(\d+)-(.+)-\d+-(packed|pre-delay)[-_](bundles-post-ra|hlo-static.*)\.txt")
# Not kernels: the module's own entry and exit.
_FRAME = ("TLP", "<late-initialization>", "<late-finalization>")


def parse_kernel(name: str, bundles_text: str, utilisation_text: str, delay_slots: int) -> Kernel:
    """Reads one kernel.

    Args:
      name: the kernel's name.
      bundles_text: `*-packed-bundles-post-ra.txt`: a line a cycle. (`*-final_bundles.txt` is
        shorter: runs of empty bundles are folded into a delay that the text does not show.)
      utilisation_text: `*-pre-delay_hlo-static-per-bundle-utilization.txt`, a row a bundle.
      delay_slots: of the generation.

    Raises:
      ValueError: the texts are not what this parser knows; other libtpu versions may differ.
    """
    bundles = _split_bundles(name, bundles_text)
    capacity, rows = _parse_utilisation(utilisation_text)
    if len(rows) != len(bundles):
        raise ValueError(f"{name}: {len(rows)} utilisation rows for {len(bundles)} bundles")
    counts = [_count(text, row) for text, row in zip(bundles, rows, strict=True)]
    root = _Span("kernel", 0, len(bundles) - 1)
    operands = tuple(Operand(*found) for found in _OPERAND.findall(bundles_text))
    tree = _nest(root, _spans(bundles, delay_slots), counts, ())
    return Kernel(name, tree, operands, capacity, tuple(counts))


def read_dump(dump: Dump) -> Schedule:
    """Reads what `compile_jobs` returned for one job."""
    texts: dict[tuple[int, str], dict[str, str]] = {}
    for file_name, text in dump.files.items():
        found = _FILE.fullmatch(file_name)
        if found and found[2] not in _FRAME:
            texts.setdefault((int(found[1]), found[2]), {})[found[3]] = text
    delay_slots = GENERATIONS[dump.job.generation].branch_delay_slots
    kernels = [
        parse_kernel(name, pair["packed"], pair["pre-delay"], delay_slots)
        for (_, name), pair in sorted(texts.items())
    ]
    return Schedule(dump.job, tuple(kernels), dump.hlo)


def _split_bundles(name: str, text: str) -> list[str]:
    """Text of each bundle, from its brace to the next bundle."""
    starts = list(_BUNDLE.finditer(text))
    if not starts or any(int(m[1], 16) != i for i, m in enumerate(starts)):
        raise ValueError(f"{name}: not a list of bundles numbered from 0: {text[:200]!r}...")
    ends = [m.start() for m in starts[1:]] + [len(text)]
    return [text[m.end() : end] for m, end in zip(starts, ends, strict=True)]


def _parse_utilisation(text: str) -> tuple[dict[str, int], list[dict[str, int]]]:
    """Slots per bundle by kind, and those used by each bundle."""
    lines = text.splitlines()
    names = [word.strip() for word in lines[1].split(",")]
    capacity = dict(zip(names, map(int, lines[2].split()), strict=True))
    rows = [line.split() for line in lines[4:] if line.strip()]
    return capacity, [dict(zip(names, map(int, row), strict=True)) for row in rows]


def _count(text: str, slots: Mapping[str, int]) -> Counts:
    """Counts of one bundle."""
    body = _COMMENT.sub("", text).strip().rstrip("}").strip()
    opcodes = [m[1] for part in body.split(";;") if (m := _OPCODE.match(part.strip()))]
    dmas = [op[len("dma.") :] for op in opcodes if op.startswith("dma.")]
    dmas = [op for op in dmas if not op.startswith("done")]
    return Counts(
        bundles=1,
        empty=not opcodes,
        dma_waits=sum(op.startswith("dma.done") for op in opcodes),
        bounds_checks=sum(op == "shalt.err" for op in opcodes) if "BoundsCheck" in text else 0,
        vector_loads=sum(op.startswith("vld") for op in opcodes),
        vector_stores=sum(op.startswith("vst") and op != "vstv" for op in opcodes),
        scalar_spills=len(re.findall(r"smem:\[#allocation\d+_spill\]", text)),
        dmas=dict(collections.Counter(dmas)),
        slots={slot: used for slot, used in slots.items() if used},
    )


@dataclasses.dataclass(frozen=True)
class _Span:
    kind: str
    first: int
    last: int
    skip_if: str = ""


def _spans(bundles: Sequence[str], delay_slots: int) -> list[_Span]:
    """Loops and skippable regions, outer before inner.

    A branch back closes a loop; a branch forward can skip what lies between its delay slots and
    its target. A loop with several branches back ends at the last of them.
    """
    loops: dict[int, int] = {}
    regions = []
    for i, text in enumerate(bundles):
        for skip_if, target in _BRANCH.findall(text):
            after = i + delay_slots
            if int(target) <= i:
                loops[int(target)] = max(after, loops.get(int(target), 0))
            elif int(target) > after + 1:
                regions.append(_Span("branch", after + 1, int(target) - 1, skip_if))
    spans = regions + [_Span("loop", first, last) for first, last in loops.items()]
    # A region and a loop of one extent: the branch guards the loop.
    return sorted(spans, key=lambda s: (s.first, -s.last, s.kind == "loop"))


def _nest(
    span: _Span, inside: Sequence[_Span], counts: Sequence[Counts], path: tuple[int, ...]
) -> Node:
    """A node of `span` with the spans inside it as its tree.

    A region that sticks out of what it starts in (an early exit) is cut there: what it skips
    beyond counts as executed.
    """
    children: list[Node] = []
    rest = list(inside)
    while rest:
        head = rest.pop(0)
        if head.last > span.last and head.kind == "loop":
            raise ValueError(f"the loop at {head.first:#x} sticks out of {span}")
        head = dataclasses.replace(head, last=min(head.last, span.last))
        inner = [s for s in rest if s.first <= head.last]
        rest = rest[len(inner) :]
        children.append(_nest(head, inner, counts, (*path, len(children))))
    covered = {i for child in children for i in range(child.first, child.last + 1)}
    own = [counts[i] for i in range(span.first, span.last + 1) if i not in covered]
    return Node(
        kind=span.kind,
        path=path,
        first=span.first,
        last=span.last,
        own=weighted_sum((c, 1) for c in own),
        children=tuple(children),
        skip_if=span.skip_if,
    )


def main() -> None:
    """Compiles one job and prints the tree of each of its kernels."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("target", help="module:function; see Job")
    parser.add_argument("generation", choices=list(TOPOLOGIES))
    parser.add_argument("kwargs", nargs="?", default="{}", help="JSON of its keyword arguments")
    parser.add_argument("--min_bundles", type=int, default=1, help="hide smaller nodes")
    args = parser.parse_args()
    job = Job("job", args.target, args.generation, json.loads(args.kwargs))
    for kernel in schedules([job])[0].kernels:
        operands = ", ".join(f"{o.kind} {o.shape} in {o.space}" for o in kernel.operands)
        print(f"{kernel.name}: {operands}")
        print(describe(kernel.tree, min_bundles=args.min_bundles))


if __name__ == "__main__":
    main()
