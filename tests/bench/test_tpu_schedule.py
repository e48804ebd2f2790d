# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""The schedule model: its parser on text of known cost and on kernels of known cost."""

import dataclasses
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from bench.tpu_model import published as model_check
from bench.tpu_model import schedule as ts
from bench.tpu_model.compile import Job, aot_compile, compile_jobs, mesh_of

# Targets for the child process: an issue loop that is unrolled by hand, and a matrix product.
_TARGETS = '''
import os
import jax, jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

POOL = jax.ShapeDtypeStruct((2**20, 8, 128), jnp.float32)  # bigger than any VMEM


def issue_loop(trips, unroll):
    """`trips * unroll` one-row copies inside the pool, with a guarded one after them."""

    def kernel(ids, _, pool, sem):
        def copy(i):
            return pltpu.make_async_copy(pool.at[i], pool.at[ids[i]], sem)

        @pl.loop(0, trips)
        def _(trip):
            for j in range(unroll):
                copy(trip * unroll + j).start()

        @pl.loop(0, trips * unroll)
        def _(i):
            copy(i).wait()

    def run(ids, pool):
        return pl.pallas_call(
            kernel,
            in_specs=[pl.BlockSpec(memory_space=pltpu.SMEM), pl.BlockSpec(memory_space=pltpu.HBM)],
            out_specs=pl.BlockSpec(memory_space=pltpu.HBM),
            out_shape=POOL,
            scratch_shapes=[pltpu.SemaphoreType.DMA],
            input_output_aliases={1: 0},
            compiler_params=pltpu.CompilerParams(disable_bounds_checks=True),
            name="issue_loop",
        )(ids, pool)

    ids = jax.ShapeDtypeStruct((trips * unroll,), jnp.int32)
    return run, (ids, POOL), {"donate_argnums": 1}


def matmul(m, k, n):
    def kernel(x, y, out):
        out[...] = jnp.dot(x[...], y[...], preferred_element_type=jnp.float32)

    def run(x, y):
        out = jax.ShapeDtypeStruct((m, n), jnp.float32)
        return pl.pallas_call(kernel, out_shape=out, name="matmul")(x, y)

    shapes = ((m, k), (k, n))
    return run, [jax.ShapeDtypeStruct(s, jnp.bfloat16) for s in shapes], {}


def broken():
    os.write(1, b"noise on stdout\\n")
    os.write(2, b"noise on stderr\\n")
    print("noise from print", flush=True)
    raise OSError("no such kernel")
'''
_MATMUL = (1024, 512, 512)


@pytest.fixture(scope="module")
def dumps(tmp_path_factory):
    """Everything compiled here, in one child process: job name -> Dump."""
    folder = tmp_path_factory.mktemp("targets")
    (folder / "schedule_targets.py").write_text(_TARGETS)
    jobs = [
        *(
            Job(f"issue {g}", "schedule_targets:issue_loop", g, {"trips": 40, "unroll": 8})
            for g in ts.GENERATIONS
        ),
        Job("issue 4", "schedule_targets:issue_loop", "v6e", {"trips": 40, "unroll": 4}),
        *(
            Job(f"matmul {g}", "schedule_targets:matmul", g, dict(zip("mkn", _MATMUL, strict=True)))
            for g in ts.GENERATIONS
        ),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(folder))
        done = []
        found = compile_jobs(jobs, on_done=lambda job, seconds: done.append(job.name))
    assert done == [job.name for job in jobs]
    return {dump.job.name: dump for dump in found}


# --- the parser, on text ----------------------------------------------------------------------

_UTILISATION = """== CAPACTIY:
MATMUL, VALU, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    2     4     3     3     2     2     2
== UTILIZATION:
"""


def _kernel(lines, delay_slots=1, rows=None):
    """Parses bundles given as the text between their braces."""
    text = "= control target key end\n\n" + "\n".join(
        f"{hex(i) if i else '0':>6}   : > {{ {line} }}" for i, line in enumerate(lines)
    )
    rows = rows or ["0 0 0 0 0 0 1"] * len(lines)
    return ts.parse_kernel("k.1", text, _UTILISATION + "\n".join(rows) + "\n", delay_slots)


def _shape(node):
    return (node.kind, node.first, node.last, [_shape(child) for child in node.children])


_LOOP = [
    "%s1 = smov.u32 0",  # 0
    "%s2 = sadd.s32 1, %s1  ;;  %3 = dma.vmem_to_hbm [thread:$0]  /*vmem=*/%s4, /*hbm=*/%s5",  # 1
    "%6 = sbr.rel (%p7_p0) target bundleno = 6 (0x6), region = 9",  # 2: skips 4, 5
    "",  # 3: its delay slot
    "%8 = dma.general /*src=*/%s6, /*dst=*/%s4 /* hbm-to-hbm\nelement_size: 512 */",  # 4
    "%9 = dma.done.wait [#allocation3], 512",  # 5
    "%10 = sbr.rel (!%p11_p4) target bundleno = 1 (0x1), region = 47",  # 6: back to 1
    "",  # 7: its delay slot
    "%12 = vst [vmem:[#allocation7]] %v1  ;;  %13 = vld [vmem:[#allocation8]]",  # 8
]


def test_a_loop_with_a_skippable_region():
    tree = _kernel(_LOOP).tree
    assert _shape(tree) == ("kernel", 0, 8, [("loop", 1, 7, [("branch", 4, 5, [])])])
    loop, region = tree.children[0], tree.children[0].children[0]
    assert (tree.own.bundles, loop.own.bundles, region.own.bundles) == (2, 5, 2)
    assert loop.own.dmas == {"vmem_to_hbm": 1}
    assert region.own.dmas == {"general": 1} and region.own.dma_waits == 1
    assert loop.total.dmas == {"vmem_to_hbm": 1, "general": 1} and loop.total.dma_issues == 2
    assert loop.own.empty == 2 and tree.total.empty == 2
    assert region.skip_if == "%p7_p0"
    assert (tree.own.vector_stores, tree.own.vector_loads) == (1, 1)
    assert loop.path == (0,) and region.path == (0, 0)
    assert loop.is_leaf and not tree.is_leaf


def test_delay_slots_belong_to_the_branch():
    lines = ["", "%1 = sbr.rel target bundleno = 6 (0x6), region = 1"] + [""] * 6
    assert _shape(_kernel(lines, delay_slots=1).tree)[3] == [("branch", 3, 5, [])]
    assert _shape(_kernel(lines, delay_slots=3).tree)[3] == [("branch", 5, 5, [])]
    assert _shape(_kernel(lines, delay_slots=4).tree)[3] == []
    lines = ["", "", "%1 = sbr.rel (%p1) target bundleno = 1 (0x1), region = 1"] + [""] * 6
    assert _shape(_kernel(lines, delay_slots=4).tree)[3] == [("loop", 1, 6, [])]


def test_if_and_else_are_two_regions():
    lines = [
        "%1 = sbr.rel (%p1) target bundleno = 6 (0x6), region = 1",
        "",
        "%2 = smov.u32 1",
        "%3 = smov.u32 1",
        "%4 = sbr.rel target bundleno = 9 (0x9), region = 2",
        "",
        "%5 = smov.u32 2",
        "%6 = smov.u32 2",
        "%7 = smov.u32 2",
        "%8 = smov.u32 3",
    ]
    tree = _kernel(lines).tree
    assert _shape(tree)[3] == [("branch", 2, 5, []), ("branch", 6, 8, [])]
    assert [node.skip_if for node in tree.children] == ["%p1", ""]
    taken = ts.executed(tree, branches=[(ts.at(0), 0.75), (ts.at(1), 0.25)])
    assert taken.bundles == 3 + 0.75 * 4 + 0.25 * 3


def test_a_guarded_loop_lies_inside_its_guard_and_an_early_exit_is_cut():
    lines = [
        "%1 = sbr.rel (%p1) target bundleno = 7 (0x7), region = 1",  # skips 2..6: the whole loop
        "",
        "%2 = smov.u32 1",
        "%3 = sbr.rel (%p2) target bundleno = 8 (0x8), region = 2",  # leaves the loop
        "",
        "%4 = sbr.rel (%p3) target bundleno = 2 (0x2), region = 3",
        "",
        "%5 = smov.u32 1",
        "%6 = smov.u32 1",
    ]
    expected = [("branch", 2, 6, [("loop", 2, 6, [("branch", 5, 6, [])])])]
    assert _shape(_kernel(lines).tree)[3] == expected


def test_a_loop_of_one_bundle():
    lines = ["", "%1 = sbr.rel (%p1) target bundleno = 1 (0x1), region = 1", "", ""]
    assert _shape(_kernel(lines, delay_slots=1).tree)[3] == [("loop", 1, 2, [])]


def test_two_back_edges_to_one_header_are_one_loop():
    back = "%4 = sbr.rel (%p3) target bundleno = 1 (0x1), region = 3"
    lines = ["", "%1 = smov.u32 1", back, "", "%2 = smov.u32 1", back, "", ""]
    assert _shape(_kernel(lines).tree)[3] == [("loop", 1, 6, [])]


def test_counts_of_checks_spills_and_slots():
    lines = [
        "%1 = shalt.err (!%p1) /* BoundsCheck 0 [deref of opnd#0] for dma.vmem_to_hbm\nhlo: k\n */",
        "%2 = shalt.err (%p1) /* Semaphore has a nonzero value */",
        "%3 = sst [smem:[#allocation91_spill]] %s1  ;;  %4 = sld [smem:[#allocation92_spill]]",
        "%5 = vstv %s1  ;;  %6 = vst.msk [vmem:[#allocation7]] %v1",
    ]
    rows = ["0 0 0 0 0 0 1", "0 0 0 0 0 0 1", "0 3 1 1 1 1 0", "2 4 0 0 1 0 0"]
    kernel = _kernel(lines, rows=rows)
    total = kernel.tree.total
    assert (total.bounds_checks, total.scalar_spills, total.vector_stores) == (1, 2, 1)
    assert total.slots == {
        "SALU": 2,
        "VALU": 7,
        "VLOAD": 1,
        "VLOAD:FILL": 1,
        "VSTORE": 2,
        "VSTORE:SPILL": 1,
        "MATMUL": 2,
    }
    assert [kernel.capacity[slot] for slot in ("VALU", "MATMUL", "SALU")] == [4, 2, 2]
    assert [b.slots.get("VALU", 0) for b in kernel.bundles] == [0, 0, 3, 4]


@pytest.mark.parametrize(
    ("text", "rows", "message"),
    [
        ("not a dump", 1, "not a list of bundles"),
        ("     0   :  { %1 = smov.u32 0 }\n   0x2   :  {}\n", 2, "not a list of bundles"),
        (
            "     0   :  { %1 = smov.u32 0 }\n   0x1   :  {}\n",
            3,
            "3 utilisation rows for 2 bundles",
        ),
    ],
)
def test_unknown_text_is_refused(text, rows, message):
    utilisation = _UTILISATION + "0 0 0 0 0 0 1\n" * rows
    with pytest.raises(ValueError, match=message):
        ts.parse_kernel("k.1", text, utilisation, 4)


# --- cost -------------------------------------------------------------------------------------


def _leaf_loop(num_dmas: int, direction: str | None = None) -> Callable[[ts.Node], bool]:
    """Predicate: an innermost loop that issues this many DMAs (in this direction) a trip."""

    def match(node: ts.Node) -> bool:
        if node.kind != "loop" or not node.is_leaf:
            return False
        total = node.total
        return (total.dma_issues if direction is None else total.dmas.get(direction, 0)) == num_dmas

    return match


def test_executed_weighs_the_tree():
    tree = _kernel(_LOOP).tree
    counts = ts.executed(
        tree, loops=[(_leaf_loop(2), 10)], branches=[(lambda n: n.own.dma_waits == 1, 0.5)]
    )
    assert counts.bundles == 2 + 10 * (5 + 0.5 * 2)
    assert counts.dmas == {"vmem_to_hbm": 10, "general": 5}
    assert ts.executed(tree, loops=[(ts.at(0), 3)]).bundles == 2 + 3 * 7
    assert ts.executed(tree, loops=[(ts.at(0), 3)], other_branches=0).bundles == 2 + 3 * 5


def test_executed_refuses_rules_that_do_not_fit():
    tree = _kernel(_LOOP).tree
    with pytest.raises(ValueError, match=r"0 of the 0 loop predicates match loop 0"):
        ts.executed(tree)
    with pytest.raises(ValueError, match="2 of the 2 loop predicates"):
        ts.executed(tree, loops=[(_leaf_loop(2), 1), (ts.at(0), 1)])
    with pytest.raises(ValueError, match="branch predicate 0 matches nothing"):
        ts.executed(tree, loops=[(ts.at(0), 1)], branches=[(ts.at(5), 1)])


def test_predicates():
    lines = [
        "%1 = smov.u32 0",
        "%2 = smov.u32 0",
        "%3 = dma.vmem_to_hbm",
        "%4 = sbr.rel (%p1) target bundleno = 2 (0x2), region = 1",
        "",
        "%5 = sbr.rel (%p1) target bundleno = 1 (0x1), region = 1",
        "",
    ]
    outer = _kernel(lines).tree.children[0]
    inner = outer.children[0]
    assert _leaf_loop(1)(inner) and _leaf_loop(1, "vmem_to_hbm")(inner)
    assert not _leaf_loop(1, "hbm_to_vmem")(inner) and not _leaf_loop(2)(inner)
    assert not _leaf_loop(1)(outer)
    assert "loop 0.0 [0x2..0x4] bundles=3" in ts.describe(outer)
    assert "loop 0.0" not in ts.describe(outer, min_bundles=4)


def test_units():
    assert ts.hbm_cycles(64 * 1024, "v6e") == pytest.approx(69.9, abs=0.1)
    assert ts.microseconds(1750, "v6e") == pytest.approx(1.0)


# --- generations ------------------------------------------------------------------------------


@pytest.mark.parametrize("generation", list(ts.GENERATIONS))
def test_generations_are_jaxs_own_figures(generation, dumps):
    ours = ts.GENERATIONS[generation]
    with jax.sharding.use_abstract_mesh(mesh_of(generation).abstract_mesh):
        info = pltpu.get_tpu_info()
    assert ours.hbm_gb_per_s == pytest.approx(info.mem_bw_bytes_per_second / 1e9, rel=1e-3)
    assert ours.vmem_bytes == info.vmem_capacity_bytes
    # The clock: peak rate over what the compiled matrix product says a cycle does.
    kernel = ts.read_dump(dumps[f"matmul {generation}"]).kernel("matmul")
    m, k, n = _MATMUL
    flop_per_cycle = 2 * m * k * n * kernel.capacity["MATMUL"] / kernel.tree.total.slots["MATMUL"]
    assert ours.clock_ghz == pytest.approx(
        info.bf16_ops_per_second / flop_per_cycle / 1e9, rel=5e-3
    )


@pytest.mark.parametrize("generation", list(ts.GENERATIONS))
def test_delay_slots_are_where_libtpu_closes_the_region(generation, dumps):
    slots = ts.GENERATIONS[generation].branch_delay_slots
    texts = [t for n, t in dumps[f"issue {generation}"].files.items() if "issue_loop" in n]
    (text,) = [t for t in texts if "CAPACTIY" not in t]
    bundles = re.split(r"(?m)^ *(?:0x[0-9a-f]+|0) +[A-Z: ]*:", text)[1:]
    branches = [i for i, bundle in enumerate(bundles) if " sbr.rel" in bundle]
    assert len(branches) >= 2
    for i in branches:
        assert "End region" in bundles[i + slots], (generation, i)


# --- real kernels -----------------------------------------------------------------------------


@pytest.mark.parametrize("generation", list(ts.GENERATIONS))
def test_an_unrolled_issue_loop(generation, dumps):
    schedule = ts.read_dump(dumps[f"issue {generation}"])
    kernel = schedule.kernel("issue_loop")
    assert {o.space for o in kernel.operands if o.shape.startswith("f32")} == {"hbm"}
    loops = [n for n in kernel.tree.walk() if n.kind == "loop"]
    issue, wait = (n for n in loops if n.is_leaf)
    assert issue.total.dmas == {"general": 8} and _leaf_loop(8, "general")(issue)
    assert wait.total.dma_issues == 0 and wait.total.dma_waits >= 1
    assert issue.total.bounds_checks == 0
    counts = ts.executed(
        kernel.tree,
        loops=[(_leaf_loop(8), 40), (lambda n: n.total.dma_waits > 0, 320)],
    )
    assert counts.dmas["general"] == 320
    assert counts.dma_waits >= 320
    assert 320 * 4 <= counts.bundles <= 320 * 40
    assert re.search(r'custom_call_target="tpu_custom_call"', schedule.hlo)


def test_equal_kernel_names_in_one_process_stay_apart(dumps):
    four = ts.read_dump(dumps["issue 4"]).kernel("issue_loop")
    eight = ts.read_dump(dumps["issue v6e"]).kernel("issue_loop")
    assert any(_leaf_loop(4)(n) for n in four.tree.walk())
    assert not any(_leaf_loop(8)(n) for n in four.tree.walk())
    assert any(_leaf_loop(8)(n) for n in eight.tree.walk())


def test_a_kernel_that_is_not_there_is_named(dumps):
    with pytest.raises(ValueError, match=r"0 kernels are named 'page_write'.*issue_loop"):
        ts.read_dump(dumps["issue 4"]).kernel("page_write")


def test_a_failing_job_says_which_and_why(tmp_path, monkeypatch, capfd):
    (tmp_path / "broken_targets.py").write_text(_TARGETS)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(RuntimeError) as caught:
        compile_jobs([Job("bad", "broken_targets:broken", "v6e")])
    message = str(caught.value)
    assert message.startswith("compiling bad for v6e failed:\nOSError: no such kernel\n")
    for noise in ("noise on stdout", "noise on stderr", "noise from print"):
        assert noise in message
    assert capfd.readouterr() == ("", "")


def test_jobs_are_checked():
    with pytest.raises(ValueError, match="generation is 'v9'"):
        Job("a", "m:f", "v9")
    with pytest.raises(ValueError, match="'module:function'"):
        Job("a", "m.f", "v6e")
    with pytest.raises(ValueError, match="names must differ"):
        compile_jobs([Job("a", "m:f", "v6e"), Job("a", "m:f", "v5e")])
    assert compile_jobs([]) == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        Job("a", "m:f", "v6e").name = "b"


# --- compiling here ---------------------------------------------------------------------------


def test_aot_compile_for_several_chips():
    def add(x, y):
        return jax.shard_map(
            lambda x, y: x + jax.lax.psum(y, "heads"),
            in_specs=(P(None, "heads"), P(None, "heads")),
            out_specs=P(None, "heads"),
        )(x, y)

    x = jax.ShapeDtypeStruct((8, 512), jnp.float32)
    compiled = aot_compile(
        add,
        (x, x),
        "v5e",
        axes={"heads": 4},
        specs=[P(None, "heads")] * 2,
        jit_kwargs={"donate_argnums": 0},
    )
    text = compiled.as_text()
    assert "num_partitions=4" in text and "all-reduce" in text
    assert "f32[8,128]" in text and "input_output_alias" in text


def test_aot_compile_keeps_what_a_jitted_function_says():
    @jax.jit(static_argnames="scale", donate_argnums=0)
    def step(pool, *, scale):
        return pool * scale

    pool = jax.ShapeDtypeStruct((8, 128), jnp.float32)
    text = aot_compile(step, (pool,), "v6e", kwargs={"scale": 3.0}).as_text()
    assert "input_output_alias" in text and "constant(3)" in text
    with pytest.raises(ValueError, match="already jitted"):
        aot_compile(step, (pool,), "v6e", jit_kwargs={"donate_argnums": 0})
    with pytest.raises(ValueError, match="2 specs for 1 args"):
        aot_compile(step, (pool,), "v6e", specs=[P(), P()])
    with pytest.raises(ValueError, match=r"want 64 devices; v6e:2x2 has 4"):
        mesh_of("v6e", {"x": 64})


# --- the model against published times --------------------------------------------------------


def test_a_wait_costs_what_its_latency_leaves():
    issue, wait, plain = ts.Counts(1, dmas={"a": 1}), ts.Counts(1, dma_waits=1), ts.Counts(1)
    assert model_check.step_cycles([issue, wait], 100) == 101
    assert model_check.step_cycles([issue, *[plain] * 200, wait], 100) == 202
    # First in, first out: the second DMA lands 10 later, and only that is left to wait for.
    assert model_check.step_cycles([issue, *[plain] * 9, issue, wait, wait], 100) == 111


def test_the_model_is_near_published_times():
    checks = model_check.check_model()
    assert [c.slices_per_step for c in checks] == list(model_check.PUBLISHED_US)
    assert all(abs(c.error) < 0.15 for c in checks), checks
    # Without latency the small steps would be far off: the model must not owe its error to luck.
    assert checks[0].schedule_us < 0.5 * checks[0].published_us
    assert checks[-1].schedule_us == pytest.approx(checks[-1].predicted_us, rel=0.01)
    text = model_check.format_check(checks)
    assert f"{checks[0].error:+.1%}" in text and "fitted" in text
