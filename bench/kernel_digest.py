# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Prove that a refactoring leaves the kernels alone: digest them before and after, and compare.

    python -m bench.kernel_digest --out=before.json
    python -m bench.kernel_digest --out=after.json --against=before.json

The cases are the shapes of `pallas_paged/tuned/`, each with the shipped configuration, read only
(`attend`) and with the writes (`write_and_attend`), and the writes of `bench.kv_write`'s default.
For a TPU the digest of a case is the number of bundles of each kernel's compiled schedule; for a
GPU (jax >= 0.11.2) it is a hash of each kernel's lowered module, printed without names and source
locations. Neither chip needs to be there.

The compiler is deterministic: a module that is lowered as before has as many bundles as before. So
a kernel whose lowered module, the program around it and the versions of jax and libtpu are those of
--against is not compiled again but takes its bundles from there. Comparing an unchanged tree then
takes a few minutes on two cores; --compile=all takes most of an hour, and --compile=none compares
lowered modules alone.

The command exits with 1 if a kernel differs. Where only the program around a kernel differs, or the
module of a TPU kernel and not its bundles, it prints a remark and exits with 0.
"""

from __future__ import annotations

import base64
import concurrent.futures
import contextlib
import dataclasses
import hashlib
import importlib
import itertools
import json
import multiprocessing
import pathlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from absl import app, flags
from jaxlib.mlir import ir

from bench import report
from bench.cases import kv_write as write_cases
from bench.cases.attention import Call
from bench.cases.kv_write import WriteCase
from bench.tpu_model import attention as attention_model
from bench.tpu_model import kv_write as kv_write_model
from bench.tpu_model import schedule as ts
from bench.tpu_model.compile import DEVICES, as_if_on
from pallas_paged import tuned

_OUT = flags.DEFINE_string("out", None, "The JSON file to write.", required=True)
_AGAINST = flags.DEFINE_string("against", None, "Compare with this file of an earlier run.")
_ONLY = flags.DEFINE_string("only", "", "Only cases whose name this regular expression finds.")
_COMPILE = flags.DEFINE_enum(
    "compile",
    "changed",
    ["changed", "all", "none"],
    "TPU kernels to compile: those that are lowered in another way than --against says, all, none.",
)

_OP = "ragged_paged_attention"
_GPU_KIND = "NVIDIA H100 80GB HBM3"
# Jax before this version cannot lower the GPU kernels.
_FIRST_JAX_FOR_GPU = (0, 11, 2)
# The numbers of sequences that stand for "few" and for "many" in a GPU's tuned entries.
_FEW_SEQS, _MANY_SEQS = 16, 256


@dataclasses.dataclass(frozen=True)
class DigestCase:
    """One call whose kernels are digested.

    Attributes:
      name: how it is found again in another run's file.
      generation: of the TPU, a key of `bench.tpu_model.schedule.GENERATIONS`; None for the GPU.
      call: an attention's call or a write.
    """

    name: str
    generation: str | None
    call: Call | WriteCase

    def job(self) -> ts.Job:
        """What is compiled for a TPU."""
        module = "kv_write" if isinstance(self.call, WriteCase) else "attention"
        target = f"bench.tpu_model.{module}:compile_target"
        return ts.Job(self.name, target, self.generation or "", dataclasses.asdict(self.call))

    def lower(self) -> jax.stages.Lowered:
        """The call, traced and lowered for its device, which need not be there."""
        if self.generation:
            model = kv_write_model if isinstance(self.call, WriteCase) else attention_model
            fn, args, jit_kwargs = model.compile_target(**dataclasses.asdict(self.call))
            with as_if_on(self.generation):
                traced = jax.jit(fn, **jit_kwargs).trace(*args)
                return traced.lower(lowering_platforms=("tpu",))
        with _as_if_on_gpu():
            traced = jax.jit(self.call.step("mosaic_gpu")).trace(*self.call.shapes())
            return traced.lower(lowering_platforms=("cuda",))


@dataclasses.dataclass(frozen=True)
class Digest:
    """What is recorded of a case.

    Attributes:
      modules: hash of each kernel's lowered module.
      program: hash of the lowered program around the kernels.
      bundles: of each Pallas kernel's schedule, in the order of `modules`; empty for a GPU, and
        where nothing was compiled.
      xla_bundles: of what XLA made beside the kernels, in the order of compilation.
    """

    modules: tuple[str, ...]
    program: str
    bundles: tuple[int, ...] = ()
    xla_bundles: tuple[int, ...] = ()


def main(argv: Sequence[str]) -> None:
    """Digests the cases, writes the file, compares."""
    report.start(argv, as_json=False, plot=None)
    report.start_backends()
    cases = [case for case in all_cases() if re.search(_ONLY.value, case.name)]
    if not cases:
        raise app.UsageError(f"--only={_ONLY.value!r} finds no case")
    before = json.loads(pathlib.Path(_AGAINST.value).read_text()) if _AGAINST.value else None
    where = report.environment()
    known: dict[str, Digest] = {}
    if before and _COMPILE.value == "changed" and _has_versions_of(before["environment"], where):
        known = digests_of(before)
    found = make_digests(cases, known)
    record = {
        "environment": where,
        "digests": {name: dataclasses.asdict(digest) for name, digest in found.items()},
    }
    with pathlib.Path(_OUT.value).open("w") as file:
        report.write_json(record, file)
    print(f"{len(found)} cases -> {_OUT.value}")
    if before is not None:
        wanted = digests_of(before)
        wanted = {name: wanted[name] for name in wanted if re.search(_ONLY.value, name)}
        differences, remarks = compare(wanted, found)
        for line in remarks:
            print(f"remark: {line}")
        for line in differences:
            print(f"DIFFERS: {line}")
        if differences:
            raise SystemExit(1)
        print("no kernel differs")


# --- cases ------------------------------------------------------------------------------------


def all_cases() -> Iterator[DigestCase]:
    """Every case that this version of jax can lower."""
    for generation in write_cases.GENERATIONS:
        for entry in tuned.entries(DEVICES[generation][0], _OP):
            call = Call(
                **{name: entry[name] for name in ("num_heads", "num_kv_heads", "head_dim")},
                page_size=entry["page_size"],
                dtype=entry["q_dtype"],
                pool_dtype=entry["pool_dtype"],
            )
            yield from _attention_cases(generation, call)
        yield from _write_cases(generation)
    if jax.__version_info__ >= _FIRST_JAX_FOR_GPU:
        for entry in tuned.entries(_GPU_KIND, _OP):
            call = Call(
                **{name: entry[name] for name in ("num_heads", "num_kv_heads", "head_dim")},
                page_size=entry["page_size"],
                pool_dtype="float8_e4m3fn" if entry["is_quantized"] else None,
                max_seqs=_FEW_SEQS if entry["has_few_seqs"] else _MANY_SEQS,
            )
            yield from _attention_cases(None, call)
        yield from _write_cases(None)


def _attention_cases(generation: str | None, call: Call) -> Iterator[DigestCase]:
    """A call that reads and one that writes too, each with the shipped configuration."""
    shape = f"{call.num_heads}/{call.num_kv_heads}/{call.head_dim} page {call.page_size}"
    if generation is None:
        shape += f" pool {call.pool_dtype or call.dtype} seqs {call.max_seqs}"
    for op in ("attend", "write_and_attend"):
        name = f"{generation or 'gpu'} {op} {shape}"
        yield DigestCase(name, generation, dataclasses.replace(call, writes=op != "attend"))


def _write_cases(generation: str | None) -> Iterator[DigestCase]:
    """The writes of `bench.kv_write`'s default: one case per kernel that is compiled for them."""
    sizes = itertools.product(write_cases.OPS, write_cases.PAGE_SIZES, write_cases.TOKENS)
    found: dict[str, DigestCase] = {}
    for op, page_size, tokens in sizes:
        case = WriteCase(
            op,
            generation or "",
            page_size,
            tokens,
            write_cases.NUM_KV_HEADS,
            write_cases.HEAD_DIM,
            write_cases.DTYPE,
        )
        if generation:
            case = kv_write_model.representative(case)
        elif tokens < max(write_cases.TOKENS) or (op == "token" and page_size > 16):
            continue  # nothing but constants in a GPU's kernel
        name = f"{generation or 'gpu'} {op} page {case.page_size} tokens {case.num_tokens}"
        found.setdefault(name, DigestCase(name, generation, case))
    yield from found.values()


def _as_if_on_gpu() -> contextlib.AbstractContextManager[Any]:
    """A context in which jax traces for the GPU of the tuned entries."""
    device = jax.sharding.AbstractDevice(_GPU_KIND, 1, "gpu")
    mesh = jax.sharding.AbstractMesh((1,), ("x",), abstract_device=device)
    return jax.sharding.use_abstract_mesh(mesh)


# --- digests ----------------------------------------------------------------------------------


def make_digests(cases: Sequence[DigestCase], known: Mapping[str, Digest]) -> dict[str, Digest]:
    """Lowers every case, and compiles those for TPUs whose lowered form is not among the known."""
    found: dict[str, Digest] = {}
    to_compile: list[tuple[DigestCase, tuple[str, ...]]] = []
    # What jax has lowered before changes how it lowers a GPU kernel: each case has a process.
    workers = concurrent.futures.ProcessPoolExecutor(
        2,
        multiprocessing.get_context("spawn"),
        initializer=report.start_backends,
        max_tasks_per_child=1,
    )
    with workers, report.Progress(len(cases), "lowering") as progress:
        for case, (digest, names) in zip(cases, workers.map(_digest_case, cases), strict=True):
            old = known.get(case.name)
            is_known = old and (old.modules, old.program) == (digest.modules, digest.program)
            found[case.name] = old if old and is_known else digest
            if case.generation and not is_known and _COMPILE.value != "none":
                to_compile.append((case, names))
            progress.step(case.name)
    jobs = [case.job() for case, _ in to_compile]
    with report.Progress(len(jobs), "compiling") as progress:
        schedules = ts.schedules(jobs, on_done=lambda job, _: progress.step(job.name))
    for (case, names), schedule in zip(to_compile, schedules, strict=True):
        kernels = [schedule.kernel(name) for name in names]
        others = [kernel for kernel in schedule.kernels if kernel not in kernels]
        found[case.name] = dataclasses.replace(
            found[case.name],
            bundles=tuple(len(kernel.bundles) for kernel in kernels),
            xla_bundles=tuple(len(kernel.bundles) for kernel in others),
        )
    return found


def _digest_case(case: DigestCase) -> tuple[Digest, tuple[str, ...]]:
    return digest_lowered(case.lower())


def digest_lowered(lowered: jax.stages.Lowered) -> tuple[Digest, tuple[str, ...]]:
    """The hashes of a lowered program and the names of its Pallas kernels.

    Raises:
      ValueError: the program has no Pallas kernel.
    """
    texts, names = [], []
    module: Any = lowered.compiler_ir("stablehlo")
    for operation in _operations(module.operation):
        if operation.name != "stablehlo.custom_call":
            continue
        attributes = operation.attributes
        target = ir.StringAttr(attributes["call_target_name"]).value
        if target == "tpu_custom_call":
            config = json.loads(ir.StringAttr(attributes["backend_config"]).value)
            config = config["custom_call_config"]
            texts.append(_module_text(base64.b64decode(config.pop("body"))))
            config.pop("debug_locations", None)
            texts[-1] += json.dumps(config, sort_keys=True)
            names.append(ir.StringAttr(attributes["kernel_name"]).value)
        elif target.startswith("mosaic_gpu"):
            module_of = ir.DictAttr(attributes["mhlo.backend_config"])["module"]
            texts.append(_module_text(ir.StringAttr(module_of).value_bytes))
            names.append(target)
    if not texts:
        raise ValueError("digest_lowered: the program has no Pallas kernel; was the op replaced?")
    around = re.sub(r'(backend_config|module|kernel_hash|kernel_name) = "[^"]*"', "", str(module))
    return Digest(tuple(map(_hash, texts)), _hash(_without_names(around))), tuple(names)


def _operations(operation: Any) -> Iterator[Any]:
    """Everything inside an operation, in order."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in block.operations:
                yield inner.operation
                yield from _operations(inner.operation)


def _module_text(bytecode: bytes) -> str:
    """A kernel's module as text, without symbols' names and source locations."""
    with ir.Context() as context:
        context.allow_unregistered_dialects = True
        for dialect in ("tpu", "mosaic_gpu"):
            # Of the kernels' dialects jax has no public name; each is part of every jaxlib.
            importlib.import_module(f"jaxlib.mosaic.python.{dialect}").register_dialect(context)
        module = ir.Module.parse(bytecode)
        return _without_names(str(module.operation.get_asm(enable_debug_info=False)))


def _without_names(text: str) -> str:
    """MLIR without names of functions: a new name is no other kernel."""
    return re.sub(r'@[\w.]+|sym_name = "[^"]*"', "", text)


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


# --- comparison -------------------------------------------------------------------------------


def _has_versions_of(before: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    return all(before[name] == now[name] for name in ("jax", "jaxlib", "libtpu"))


def digests_of(record: Mapping[str, Any]) -> dict[str, Digest]:
    """The digests of a file's record, by case."""
    return {
        name: Digest(
            tuple(fields["modules"]),
            fields["program"],
            tuple(fields["bundles"]),
            tuple(fields["xla_bundles"]),
        )
        for name, fields in record["digests"].items()
    }


def compare(
    before: Mapping[str, Digest], after: Mapping[str, Digest]
) -> tuple[list[str], list[str]]:
    """What differs between two runs.

    Returns:
      (differences, remarks), a sentence each. A difference is a kernel with another number of
      bundles, a kernel with another module of which not both runs have bundles, or a case that
      only one run has. A remark is what else differs: the module of a kernel that has as many
      bundles, or the program around a kernel.
    """
    differences = [f"{name}: only before" for name in before if name not in after]
    differences += [f"{name}: only after" for name in after if name not in before]
    remarks = []
    for name in (name for name in after if name in before):
        old, new = before[name], after[name]
        both_compiled = bool(old.bundles and new.bundles)
        if both_compiled and old.bundles != new.bundles:
            differences.append(f"{name}: {_sum(old)} bundles before, {_sum(new)} after")
        elif old.modules != new.modules and both_compiled:
            remarks.append(f"{name}: the lowered module is another one, its bundles are as many")
        elif old.modules != new.modules:
            differences.append(f"{name}: the lowered module is another one")
        if old.program != new.program:
            change = f"XLA's bundles {list(old.xla_bundles)} before, {list(new.xla_bundles)} after"
            remarks.append(f"{name}: the program around the kernel differs; {change}")
    return differences, remarks


def _sum(digest: Digest) -> str:
    return " + ".join(map(str, digest.bundles))


if __name__ == "__main__":
    app.run(main)
