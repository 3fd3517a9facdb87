"""Device mesh and sharding rules: one table from logical axes to mesh axes."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lnjax.errors import ConfigError
from lnjax.schema import MeshConfig

AXES = ("data", "fsdp", "context", "tensor")

RULES: dict[str | None, str | tuple[str, ...] | None] = {
    "batch": ("data", "fsdp"),  # rows of tokens, slots of the engine
    "positions": "context",  # tokens of a row inside attention, FFN and head
    "residual": ("context", "tensor"),  # tokens of a row between them (sequence parallelism, arXiv 2205.05198)
    "embed": ("fsdp", "context"),  # model width of parameters
    "heads": "tensor",  # query heads x head_dim, kv heads x head_dim
    "ffn": "tensor",
    "vocab": "tensor",
    "layers": None,
    None: None,
}


def make_mesh(c: MeshConfig, *, devices: Sequence[Any] | None = None) -> Mesh:
    """A mesh of AXES over all devices; one axis may be -1. Raises ConfigError when they do not fit."""
    devices = jax.devices() if devices is None else list(devices)
    sizes = [getattr(c, axis) for axis in AXES]
    if sizes.count(-1) > 1:
        named = ", ".join(f"{axis}={size}" for axis, size in zip(AXES, sizes, strict=True))
        raise ConfigError(f"mesh: only one axis may be -1, got {named}")
    rest = math.prod(s for s in sizes if s != -1)
    if -1 in sizes and rest > 0 and len(devices) % rest == 0:
        sizes[sizes.index(-1)] = len(devices) // rest
    if min(sizes) < 1 or math.prod(sizes) != len(devices):
        raise ConfigError(
            f"mesh: data={c.data} x fsdp={c.fsdp} x context={c.context} x tensor={c.tensor} does not make "
            f"{len(devices)} devices; change --mesh.* so that their product does"
        )
    return Mesh(np.asarray(devices).reshape(sizes), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def platform(mesh: Mesh) -> str:
    """`cpu` or `gpu`: of the devices that the mesh is of, which need not be here."""
    return mesh.devices.flat[0].platform


def inside() -> frozenset[str]:
    """Mesh axes of whose shards the code being traced sees one alone: those of the jax.shard_map around it."""
    return frozenset(jax.sharding.get_abstract_mesh().manual_axes)


def axes_of(logical: str | None) -> tuple[str, ...]:
    """Mesh axes that share a dim of this logical axis, less those of which a single shard is seen."""
    axes = RULES[logical]
    return tuple(a for a in ((axes,) if isinstance(axes, str) else axes or ()) if a not in inside())


def partition(*logical: str | None) -> PartitionSpec:
    """PartitionSpec of an array whose dims carry these logical axes."""
    return PartitionSpec(*(axes_of(name) or None for name in logical))


def sharding(mesh: Mesh, *logical: str | None) -> NamedSharding:
    return NamedSharding(_here(mesh), partition(*logical))


def _here(mesh: Mesh) -> Any:
    return jax.sharding.get_abstract_mesh() if inside() else mesh


def constrain(x: Array, mesh: Mesh, *logical: str | None) -> Array:
    """Pin the layout of an intermediate value inside jit."""
    return jax.lax.with_sharding_constraint(x, sharding(mesh, *logical))


def by_device(f: Callable[..., Any], *, mesh: Mesh, in_specs: Sequence[PartitionSpec], out_specs: Any) -> Any:
    """jax.shard_map of `f`, which has no scalar arguments. JAX sums an input's gradient over all axes that its spec does not
    name: those of a single device are named here, else a CPU copies the gradient for each."""
    left = [a for a in mesh.axis_names if a not in inside()]
    alone = [a for a in left if mesh.shape[a] == 1]

    def named(spec: PartitionSpec) -> PartitionSpec:
        dims = [(d,) if isinstance(d, str) else d or () for d in spec]
        return PartitionSpec((*dims[0], *(a for a in alone if not any(a in d for d in dims))), *dims[1:])

    given, axes = tuple(map(named, in_specs)), set(left)
    return jax.shard_map(f, mesh=_here(mesh), in_specs=given, out_specs=out_specs, axis_names=axes, check_vma=False)


def psum(x: Any, axes: str | tuple[str, ...], mesh: Mesh) -> Any:
    """jax.lax.psum, but nothing where the axes are of a single device."""
    axes = tuple(a for a in ((axes,) if isinstance(axes, str) else axes) if mesh.shape[a] > 1)
    return jax.lax.psum(x, axes) if axes else x


def axis_size(mesh: Mesh, logical: str) -> int:
    """Devices that share one dim of this logical axis."""
    return math.prod(mesh.shape[a] for a in axes_of(logical))


def positions_axis(mesh: Mesh, *, num_tokens: int, between_blocks: bool = False) -> str | None:
    """Logical axis of a dim of `num_tokens` positions; where they do not divide (one decoded token), fewer devices share it."""
    wanted = ("residual", "positions") if between_blocks else ("positions",)
    return next((a for a in wanted if num_tokens % axis_size(mesh, a) == 0), None)


def check_divisible(mesh: Mesh, *, name: str, shape: Sequence[int], logical: Sequence[str | None]) -> None:
    """Raises ConfigError naming the dimension that the mesh does not divide."""
    for size, axis in zip(shape, logical, strict=True):
        parts = axis_size(mesh, axis) if axis else 1
        if size % parts:
            raise ConfigError(
                f"{name}: its {axis} dimension of {size} does not divide over {parts} devices "
                f"(mesh axis {RULES[axis]}); choose another --mesh.*"
            )


def put_rows(mesh: Mesh, tree: Any) -> Any:
    """Host arrays with rows first -> device arrays split over the batch axes; scalars are replicated.

    Every process passes the whole array; each device keeps its rows.
    """

    def put(x: np.ndarray) -> Array:
        x = np.asarray(x)
        where = sharding(mesh, *(("batch",) + (None,) * (x.ndim - 1) if x.ndim else ()))
        return jax.make_array_from_callback(x.shape, where, lambda index: x[index])

    return jax.tree.map(put, tree)


def fetch(x: Array) -> np.ndarray:
    """The whole array on the host of every process, however it is sharded. Collective."""
    if jax.process_count() == 1:
        return np.asarray(jax.device_get(x))
    return np.asarray(multihost_utils.process_allgather(x, tiled=True))
