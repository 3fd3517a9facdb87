"""Parameters that are not there yet: shapes, dtypes and where they will lie."""

from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

from lnjax.mesh import check_divisible, sharding


def abstract(state: nnx.State, *, dtype: Any, mesh: Mesh) -> Any:
    """The tree of a state as ShapeDtypeStructs with shardings. Raises ConfigError where the mesh does not divide a dim."""
    flat = {}
    for path, param in nnx.to_flat_state(state):
        logical = param.get_metadata()["logical"]
        check_divisible(mesh, name="/".join(map(str, path)), shape=param.shape, logical=logical)
        flat[path] = jax.ShapeDtypeStruct(param.shape, dtype, sharding=sharding(mesh, *logical))
    return nnx.traversals.unflatten_mapping(flat)
