"""Low-rank adapters (LoRA, arXiv 2106.09685): W stays as it is, W + (alpha / rank) A B is what the model computes with.

Legend: A [in, rank] random, B [rank, out] zero at first, both stacked over a run's layers as their kernel W [in, out] is.
Adapters lie beside the decoder's parameters in the tree, under LORA, as `runs/<i>/<part>/<kernel>_a` and `_b`; a tree
without them is the model itself.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding

from lnjax.errors import ConfigError
from lnjax.schema import LoraConfig

LORA = "lora"


class Adapter(nnx.Variable):
    """A factor that is trained in place of its kernel."""


def check_lora(c: LoraConfig) -> None:
    """Raises ConfigError for a rank or a kernel that cannot be."""
    known = LoraConfig().targets
    if unknown := [name for name in c.targets if name not in known]:
        raise ConfigError(f"model.lora.targets: no kernel {unknown[0]!r}; the decoder has {', '.join(known)}")
    if c.rank < 0 or (c.rank and not c.targets):
        raise ConfigError(
            f"model.lora: rank {c.rank} of {len(c.targets)} targets; give a positive rank and targets, or rank 0 for none"
        )


def adapt(decoder: Any, c: LoraConfig | None, *, rngs: nnx.Rngs) -> Any:
    """The decoder, its target kernels with adapters beside them. They are split over devices as their kernel's dims are."""
    if c is None:
        return decoder
    for blocks in decoder.runs.values():
        for part in (getattr(blocks, name) for name in ("attention", "ffn") if hasattr(blocks, name)):
            part.lora_scale = c.alpha / c.rank
            for name in (x for x in c.targets if hasattr(part, x)):
                kernel = getattr(part, name)
                (n, d_in, d_out), (layers, *logical) = kernel.shape, kernel.get_metadata()["logical"]
                a = jax.random.normal(rngs.params(), (n, d_in, c.rank)) * d_in**-0.5
                setattr(part, f"{name}_a", Adapter(a, logical=(layers, logical[0], None)))
                setattr(part, f"{name}_b", Adapter(jnp.zeros((n, c.rank, d_out)), logical=(layers, None, logical[1])))
    return decoder


def merge(params: Any, c: LoraConfig) -> Any:
    """The decoder's parameters with their adapters added in, of W's dtype and sharding; kernels without one are not copied.

    Parameters without adapters are returned as they are.
    """
    if LORA not in params:
        return params
    flat = nnx.traversals.flatten_mapping({k: v for k, v in params.items() if k != LORA})
    factors = nnx.traversals.flatten_mapping(params[LORA])
    for *path, name in (path for path in factors if path[-1].endswith("_a")):
        kernel, a, b = (*path, name[:-2]), factors[*path, name], factors[*path, f"{name[:-2]}_b"]
        flat[kernel] = _merge(flat[kernel], a, b, scale=c.alpha / c.rank, where=flat[kernel].sharding)
    return nnx.traversals.unflatten_mapping(flat)


@functools.partial(jax.jit, static_argnames=("scale", "where"))
def _merge(w: Array, a: Array, b: Array, *, scale: float, where: NamedSharding) -> Array:
    def layer(factors: tuple[Array, Array, Array]) -> Array:  # one after the other: float32 for one layer only
        w, a, b = factors
        return (w + scale * jnp.matmul(a, b, preferred_element_type=jnp.float32)).astype(w.dtype)

    return jax.lax.with_sharding_constraint(jax.lax.map(layer, (w, a, b)), where)
