"""Matrix products of the decoder's blocks: x [..., D] @ w [D, F] -> [..., F] in x's dtype.

Legend: M tokens, D in, F out.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from lnjax.errors import KernelUnavailable
from lnjax.mesh import axes_of, by_device, partition, positions_axis, psum

Logical = tuple[str | None, str | None]
E4M3, E5M2 = jnp.float8_e4m3fn, jnp.float8_e5m2
FP8_MULTIPLE = 16
"""cuBLASLt's FP8 products take dims of whole multiples of this."""
FP8_ERROR = 0.1
"""Relative, of a product of random matrices; e4m3 has 3 bits of mantissa, e5m2 has 2: 0.04 forward, 0.06 backward."""
PRODUCT = "product"
"""Name of what a forward product is kept as, where products are kept for the backward pass."""
CALLS_FP8 = '"__cublas$lt$matmul$f8"', '"te_gemm'
"""Targets of calls that are such products; Transformer Engine is given no others here."""


@jax.custom_vjp
def matmul_xla(x: Array, w: Array) -> Array:
    return jnp.matmul(x, w)


def _xla_bwd(residuals: tuple[Array, Array], g: Array) -> tuple[Array, Array]:
    """The transposes that JAX derives take XLA:CPU twice as long: it moves the operands first."""
    x, w = residuals
    return jnp.einsum("...f,df->...d", g, w), jnp.einsum("...d,...f->df", x, g)


matmul_xla.defvjp(lambda x, w: (jnp.matmul(x, w), (x, w)), _xla_bwd)


def quantize(x: Array, dtype: Any) -> tuple[Array, Array]:
    """(x in `dtype`, the float32 scalar that it is to be multiplied by). The tensor's largest value becomes the dtype's
    (current scaling: arXiv 2209.05433 with the tensor's own maximum instead of a history)."""
    largest = jnp.max(jnp.abs(x)).astype(jnp.float32)
    top = float(jnp.finfo(dtype).max)
    scale = jnp.where(largest > 0, top / jnp.maximum(largest, 1e-30), 1.0)
    return jnp.clip(x.astype(jnp.float32) * scale, -top, top).astype(dtype), 1.0 / scale


def _product(a: Array, b: Array, scale: Array, *, contract: tuple[int, int], dtype: jnp.dtype) -> Array:
    """A product of FP8 matrices, accumulated in float32. The operands go in as they are: widened first, as quantise-dequantise
    recipes have it, XLA multiplies them in bfloat16 on Hopper."""
    dims = (((contract[0],), (contract[1],)), ((), ()))
    return (jax.lax.dot_general(a, b, dims, preferred_element_type=jnp.float32) * scale).astype(dtype)


@jax.custom_vjp
def _fp8(x_MD: Array, w_DF: Array) -> Array:
    return _fp8_fwd(x_MD, w_DF)[0]


def _fp8_fwd(x_MD: Array, w_DF: Array):
    (x, x_scale), (w, w_scale) = quantize(x_MD, E4M3), quantize(w_DF, E4M3)
    out = _product(x, w, x_scale * w_scale, contract=(1, 0), dtype=x_MD.dtype)
    return out, (x, x_scale, w, w_scale)


def _fp8_bwd(residuals, g_MF: Array):
    x, x_scale, w, w_scale = residuals
    g, g_scale = quantize(g_MF, E5M2)
    dx = _product(g, w, g_scale * w_scale, contract=(1, 1), dtype=g_MF.dtype)
    dw = _product(x, g, g_scale * x_scale, contract=(0, 0), dtype=g_MF.dtype)
    return dx, dw


_fp8.defvjp(_fp8_fwd, _fp8_bwd)


def fp8_rows(x: Array, w: Array, *, option: str) -> Array:
    """x [..., D] as a matrix. Raises ValueError where a dim of its product with w is no multiple of 16."""
    rows = x.size // x.shape[-1]
    for name, size in (("tokens", rows), ("in", w.shape[0]), ("out", w.shape[1])):
        if size % FP8_MULTIPLE:
            raise ValueError(f"ops.matmul={option}: {name} dim {size} of [{rows}, {w.shape[0]}] @ [{w.shape[0]}, {w.shape[1]}] "
                             f"is no multiple of {FP8_MULTIPLE}; use --ops.matmul xla")  # fmt: skip
    return x.reshape(rows, x.shape[-1])


def matmul_fp8(x: Array, w: Array) -> Array:
    """Both operands in FP8 with one current scale each: e4m3 forward, e5m2 for gradients (arXiv 2209.05433); all three
    products of the pass. Raises ValueError where a dim is no multiple of 16."""
    return checkpoint_name(_fp8(fp8_rows(x, w, option="fp8"), w), PRODUCT).reshape(*x.shape[:-1], w.shape[1])


def matmul_sharded(x: Array, w: Array, logical: Logical, *, kernel: Callable[..., Array], mesh: Mesh) -> Array:
    """x [B, T, D] @ w [D, F] by `kernel` on every device: its tokens, its part of w, whose dims have these logical axes. Partial
    sums meet at the end and leave split over positions, as the residual stream is, where these divide."""
    before, (into, out) = positions_axis(mesh, num_tokens=x.shape[1]), (a if a != "embed" else None for a in logical)
    summed = tuple(a for a in axes_of(into) if mesh.shape[a] > 1)
    after = positions_axis(mesh, num_tokens=x.shape[1], between_blocks=bool(summed))

    def local(x, w):
        y = kernel(x, w)
        if summed and after == "residual":
            return jax.lax.psum_scatter(y, summed, scatter_dimension=1, tiled=True)
        return psum(y, summed, mesh)

    specs = partition("batch", before, into), partition(into, out)
    return by_device(local, mesh=mesh, in_specs=specs, out_specs=partition("batch", after, out))(x, w)


def count_fp8(program: str) -> int:
    """Products of two FP8 operands in the text of a program compiled for a GPU: dots that a Triton kernel makes as such, and
    calls of libraries."""
    narrow = set(re.findall(r"(%[\w.-]+) = f8\w+\[", program))
    dots = re.findall(r" dot\((%[\w.-]+), (%[\w.-]+)\)", program)
    return sum(a in narrow and b in narrow for a, b in dots) + sum(map(program.count, CALLS_FP8))


def check_products(option: str, matmul: Callable[..., Array]) -> None:
    """Compile and run one small pass on this machine's GPU. Raises KernelUnavailable where it has no FP8 products, or wrong
    ones."""
    keys = jax.random.split(jax.random.key(0), 3)
    x, w, g = (jax.random.normal(k, (256, 256), jnp.bfloat16) for k in keys)

    def both(matmul, x, w, g):
        out, back = jax.vjp(matmul, x, w)
        return out, *back(g)

    program = jax.jit(functools.partial(both, matmul)).lower(x, w, g).compile()
    found = count_fp8(program.as_text() or "")
    if found != 3:
        raise KernelUnavailable(
            f"ops.matmul={option}: {found} of 3 products are FP8 on {jax.devices()[0].device_kind}, which needs compute "
            "capability 8.9 or later; use --ops.matmul xla"
        )
    pairs = zip(program(x, w, g), both(matmul_xla, x, w, g), strict=True)
    errors = [float(jnp.linalg.norm(ours - theirs) / jnp.linalg.norm(theirs)) for ours, theirs in pairs]
    if not max(errors) < FP8_ERROR:
        raise KernelUnavailable(
            f"ops.matmul={option}: relative errors {errors} of forward and backward products, expected below {FP8_ERROR}; use "
            "--ops.matmul xla"
        )
