"""Rows of an embedding whose vocabulary is split over the mesh's tensor axis, without gathering it."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import Mesh

from lnjax.mesh import by_device, partition, positions_axis, psum


def embed_xla(table_VD: Array, tokens_BT: Array, *, mesh: Mesh) -> Array:
    """[B, T, D], positions split as between blocks. Each device looks up the tokens whose rows it has; the sum is all."""
    num_tokens = tokens_BT.shape[1]
    inside = positions_axis(mesh, num_tokens=num_tokens)
    between = positions_axis(mesh, num_tokens=num_tokens, between_blocks=True)

    def local(table, tokens):
        row = tokens - jax.lax.axis_index("tensor") * table.shape[0]
        mine = (row >= 0) & (row < table.shape[0])
        x = jnp.where(mine[..., None], table[jnp.where(mine, row, 0)], 0)
        if between == "residual" and mesh.shape["tensor"] > 1:
            return jax.lax.psum_scatter(x, "tensor", scatter_dimension=1, tiled=True)
        return psum(x, "tensor", mesh)

    specs = partition("vocab", None), partition("batch", inside)
    return by_device(local, mesh=mesh, in_specs=specs, out_specs=partition("batch", between, None))(table_VD, tokens_BT)
