# Copyright 2026 The pallas_paged Authors. Licensed under the Apache License, Version 2.0.
"""Which backend runs an op: the backends' names, their order, and the only platform test."""

import contextvars
import dataclasses
import functools
import warnings
from collections.abc import Callable
from typing import Any, Literal, get_args

import jax
from jax.experimental.pallas import tpu as pltpu
from jax.extend.core import Primitive
from jax.interpreters import mlir

from pallas_paged import scalars

Backend = Literal["auto", "oracle", "xla", "mosaic_tpu", "mosaic_gpu"]

# The platform that the kernels of each backend are for, or None for plain jax.numpy, which runs on
# all. "auto" takes the first backend in this order that is for the platform and can run the call.
_PLATFORM: dict[str, str | None] = {
    "mosaic_tpu": "tpu",
    "mosaic_gpu": "gpu",
    "xla": None,
    "oracle": None,
}

BACKENDS = tuple(name for name in get_args(Backend) if name != "auto")


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a backend would run for a call, or why it cannot run the call.

    Attributes:
      spec: the static parameters that the backend launches its kernels with; None for the oracle
        and for a call that cannot run.
      refusal: why the backend cannot run the call, as a sentence; None if it can.
    """

    spec: Any = None
    refusal: str | None = None


def _device() -> Any:
    """The device that a call made now is traced for.

    It is that of the mesh in context, if there is one, else the default device. In an ahead-of-time
    trace it is a device of the topology, or an AbstractDevice that only says its kind.
    """
    device: Any = jax.sharding.get_abstract_mesh().abstract_device
    if device is None:
        config: Any = jax.config  # its flags are attributes, which not every jax declares
        device = config.jax_default_device
    if device is None or isinstance(device, str):
        device = jax.devices(device)[0]
    return device


def platform() -> str:
    """The platform that a call made now is traced for: "tpu", "gpu" or "cpu"."""
    return _device().platform


def tpu_generation() -> int | None:
    """The generation of the TPU of a call (7 for tpu7x); None on other platforms."""
    return pltpu.get_tpu_info().generation if pltpu.is_tpu_device() else None


def tpu_vmem_bytes() -> int | None:
    """The bytes of VMEM of a core of the TPU of a call; None on other platforms."""
    return pltpu.get_tpu_info().vmem_capacity_bytes if pltpu.is_tpu_device() else None


def tpu_device_kind() -> str | None:
    """What jax calls the TPU of a call ("TPU v6 lite"); None on other platforms."""
    return _device().device_kind if pltpu.is_tpu_device() else None


def why_no_mosaic_gpu() -> str | None:
    """Why Mosaic GPU kernels cannot run a call made now, as a sentence; None if they can."""
    if jax.__version_info__ < (0, 11, 2):
        return (
            f"jax is {jax.__version__}, and a kernel can update a pool in place on a GPU (through "
            "jax.new_ref) from 0.11.2 on; update jax"
        )
    device = _gpu()
    if device is None:
        return None  # the call is lowered for another machine, or interpreted
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        return (
            f"the GPU has compute capability {capability}, and the kernels are written for Hopper "
            "(9.0)"
        )
    return None


def gpu_device_kind() -> str | None:
    """What jax calls the GPU of a call ("NVIDIA H100 80GB HBM3"); None on other platforms."""
    return _device().device_kind if platform() == "gpu" else None


def num_multiprocessors() -> int:
    """The multiprocessors of the GPU of a call; those of an H100 on other platforms."""
    device = _gpu()
    return 132 if device is None else device.core_count


def _gpu() -> Any:
    """The GPU of this machine that a call made now is traced for; None if there is none."""
    if platform() != "gpu":
        return None
    device = _device()
    if hasattr(device, "compute_capability"):
        return device
    # The mesh's device only says its kind: take any device of this machine that is of that kind.
    return next((d for d in jax.devices() if d.device_kind == device.device_kind), None)


@dataclasses.dataclass(frozen=True)
class BackendChoice:
    """Which backend runs a call, and why the others do not.

    Attributes:
      backend: the backend that runs the call; None if the one that was named cannot.
      reasons: of every other backend, why it does not run the call, as a sentence.
    """

    backend: str | None
    reasons: dict[str, str]

    def __str__(self) -> str:
        head = f"{self.backend} runs this call." if self.backend else "Nothing runs this call."
        return "\n".join([head, *(f"{name}: {why}." for name, why in self.reasons.items())])


class _Explained(BaseException):
    """Ends a call of which only the choice of its backend is wanted."""

    def __init__(self, choice: BackendChoice) -> None:
        super().__init__(choice)
        self.choice = choice


_is_explaining = contextvars.ContextVar("is_explaining", default=False)


def explain_backend(op: Callable[..., Any], *args: Any, **kwargs: Any) -> BackendChoice:
    """Says which backend a call of an op would take here, and why each other one does not run it.

    Nothing is computed, traced or donated.

    Args:
      op: `page_write`, `slice_write`, `token_write`, `copy_pages`, `gather_pages`, `scatter_pages`,
        `ragged_paged_attention` or `write_and_attend`.
      args, kwargs: the arguments of the call. Of an array only the shape and the dtype are read, so
        that it may be a `jax.ShapeDtypeStruct`.

    Returns:
      The choice; printed, it is one line per backend.

    Raises:
      ValueError: an argument of the call has the wrong form, or `op` chooses no backend.

    >>> import jax.numpy as jnp
    >>> import pallas_paged
    >>> pool = pallas_paged.make_kv_pages(4, 16, num_kv_heads=1, head_dim=128)
    >>> ids = jnp.array([2], jnp.int32)
    >>> print(explain_backend(pallas_paged.copy_pages, pool, ids, ids))  # on a CPU
    xla runs this call.
    mosaic_tpu: its kernels are for a tpu, and the call is traced for a cpu.
    mosaic_gpu: its kernels are for a gpu, and the call is traced for a cpu.
    oracle: "auto" prefers xla.
    """
    token = _is_explaining.set(True)
    try:
        op(*args, **kwargs)
    except _Explained as explained:
        return explained.choice
    finally:
        _is_explaining.reset(token)
    raise ValueError(
        f"explain_backend: argument `op` is {scalars.show(op)}; wanted an op of pallas_paged that "
        "takes a backend: pass the function, then the arguments of the call"
    )


def choose(op: str, backend: str, plan_of: Callable[[str], Plan]) -> tuple[str, Any]:
    """Picks the backend of one call.

    On an accelerator, a call that "auto" gives to another backend than the kernels for it is
    announced by a warning, once for every reason.

    Args:
      op: the op's name, for the message.
      backend: "auto" or the name of a backend. A named backend is used or refused, never replaced.
      plan_of: `plan_of(name)` returns the plan of a backend. It is not asked for the oracle, which
        runs every call.

    Returns:
      the name of the backend, and the `spec` of its plan.

    Raises:
      ValueError: `backend` is not the name of a backend.
      NotImplementedError: the named backend cannot run this call; the message says why.

    >>> choose("page_write", "oracle", lambda name: Plan(refusal="it is not here"))
    ('oracle', None)
    """
    is_auto = isinstance(backend, str) and backend == "auto"
    if not is_auto and (not isinstance(backend, str) or backend not in BACKENDS):
        raise ValueError(
            f'{op}: backend is {scalars.show(backend)}; wanted "auto" or one of '
            f"{', '.join(map(repr, BACKENDS))}"
        )
    if _is_explaining.get():
        raise _Explained(_explain(backend, is_auto, plan_of))
    refusals: dict[str, str] = {}
    for name, its_platform in _PLATFORM.items():
        if (its_platform in (None, platform())) if is_auto else name == backend:
            plan = _plan_of(name, plan_of)
            if plan.refusal is None:
                if refusals and platform() != "cpu":
                    kernels = next(iter(refusals))
                    _warn_once(op, kernels, refusals[kernels], name)
                return name, plan.spec
            refusals[name] = plan.refusal
    raise NotImplementedError(
        f"{op}: backend {backend!r} cannot run this call: {refusals[backend]}"
    )


def _plan_of(name: str, plan_of: Callable[[str], Plan]) -> Plan:
    return Plan() if name == "oracle" else plan_of(name)


def _explain(backend: str, is_auto: bool, plan_of: Callable[[str], Plan]) -> BackendChoice:
    """Why each backend does or does not run a call."""
    chosen: str | None = None
    reasons: dict[str, str] = {}
    for name, its_platform in _PLATFORM.items():
        refusal = _plan_of(name, plan_of).refusal
        if not is_auto and name != backend:
            reasons[name] = f"backend={backend!r} was named"
        elif is_auto and its_platform not in (None, platform()):
            reasons[name] = (
                f"its kernels are for a {its_platform}, and the call is traced for a {platform()}"
            )
        elif refusal is not None:
            reasons[name] = refusal
        elif chosen is None:
            chosen = name
        else:
            reasons[name] = f'"auto" prefers {chosen}'
    return BackendChoice(chosen, reasons)


@functools.cache
def _warn_once(op: str, kernels: str, refusal: str, chosen: str) -> None:
    warnings.warn(
        f"{op}: backend {kernels!r} cannot run this call, and {chosen!r} runs it, which is slower: "
        f"{refusal}. Name backend={chosen!r} to say that this is meant",
        UserWarning,
        stacklevel=4,
    )


def require_lowering(op: str, backend: str, is_auto: bool, x: jax.Array) -> jax.Array:
    """Returns `x` as it is, and refuses to lower it for a platform that the backend may not suit.

    jit may trace a call on one machine and lower it for another (`jax.export`, ahead-of-time
    compilation), and only the lowering knows the platform of the latter.

    Args:
      op: the op's name, for the message.
      backend: the backend that runs the op.
      is_auto: whether "auto" chose the backend, by the platform of the trace.
      x: an array that the op computes with.

    Raises:
      NotImplementedError: at the lowering. The message says what to do.
    """
    return _require_lowering_p.bind(
        x,
        op=op,
        backend=backend,
        is_auto=is_auto,
        traced_for=platform(),
        knows_tpu=pltpu.is_tpu_device(),
    )


_require_lowering_p = Primitive("require_lowering")
_require_lowering_p.def_impl(lambda x, **_: x)
_require_lowering_p.def_abstract_eval(lambda x, **_: x)

_TRACE_FOR = (
    "trace and lower it inside `jax.sharding.use_abstract_mesh` of an ahead-of-time topology's "
    'mesh, or of `AbstractMesh((1,), ("x",), abstract_device=AbstractDevice("TPU v6 lite", 1, '
    '"tpu"))` with the kind of device that will run it (pallas_paged/README.md, "Export")'
)


def _lower_require_lowering(
    ctx: mlir.LoweringRuleContext,
    x: Any,
    *,
    op: str,
    backend: str,
    is_auto: bool,
    traced_for: str,
    knows_tpu: bool,
) -> list[Any]:
    """The lowering rule of `require_lowering`: `x` as it is, or an error."""
    for name in ctx.platforms or ctx.module_context.platforms:
        lowered_for = "gpu" if name in ("cuda", "rocm") else name
        if is_auto and lowered_for != traced_for:
            raise NotImplementedError(
                f'{op}: backend "auto" chose {backend!r} because the call was traced for a '
                f"{traced_for}, and it is lowered for a {lowered_for}: name the backend that is to "
                f"run there, or {_TRACE_FOR}"
            )
        if lowered_for in _PLATFORM.values() and _PLATFORM[backend] not in (None, lowered_for):
            raise NotImplementedError(
                f"{op}: backend {backend!r} is lowered for a {lowered_for}, and its kernels are "
                f'for another kind of chip: name another backend, or "auto" and {_TRACE_FOR}'
            )
        if (backend, lowered_for) == ("mosaic_tpu", "tpu") and not knows_tpu:
            raise NotImplementedError(
                f"{op}: backend {backend!r} is lowered for a TPU, and block sizes and kernels "
                f"depend on its generation, which the {traced_for} that the call was traced for "
                f"does not tell: {_TRACE_FOR}"
            )
    return [x]


mlir.register_lowering(_require_lowering_p, _lower_require_lowering)
