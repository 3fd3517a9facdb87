"""Kernels behind one signature each, resolved once by name."""

import functools
from dataclasses import dataclass
from typing import Protocol

from jax import Array
from jax.sharding import Mesh

from lnjax.errors import KernelUnavailable
from lnjax.mesh import platform
from lnjax.ops.attention import attention_sharded, attention_xla
from lnjax.ops.cudnn import attention_cudnn, check_packed
from lnjax.ops.head import HeadOutput, head_xla
from lnjax.ops.matmul import Logical, check_products, matmul_fp8, matmul_sharded, matmul_xla
from lnjax.ops.te import attention_te, matmul_te
from lnjax.schema import OpsConfig

FP8 = {"fp8": matmul_fp8, "te": matmul_te}
PACKED = {"cudnn": attention_cudnn, "te": attention_te}


class Matmul(Protocol):
    """x [B, T, D] @ w [D, F] -> [B, T, F] in x's dtype; `logical`: axes of w. Pure."""

    def __call__(self, x: Array, w: Array, logical: Logical) -> Array: ...


class Attention(Protocol):
    """Causal within a segment; padding (segment 0) returns 0."""

    def __call__(self, q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segments_BT: Array) -> Array: ...


class Head(Protocol):
    """Logprobs and entropy of the wanted targets; never a [tokens, vocabulary] array."""

    def __call__(
        self, x_BTD: Array, w_VD: Array, targets_BT: Array, *, temperature: float, wanted_BT: Array | None
    ) -> HeadOutput: ...


@dataclass(frozen=True, slots=True)
class Ops:
    mesh: Mesh
    matmul: Matmul
    attention: Attention
    head: Head


def select_ops(c: OpsConfig, *, mesh: Mesh) -> Ops:
    """Raises KernelUnavailable for a name that cannot run here."""
    where = platform(mesh)
    products = {"xla": matmul_xla} | FP8
    matmuls = {name: functools.partial(matmul_sharded, kernel=f, mesh=mesh) for name, f in products.items()}
    kernels = {"xla": functools.partial(attention_xla, serial=where == "cpu")} | PACKED
    attentions = {name: functools.partial(attention_sharded, kernel=f, mesh=mesh) for name, f in kernels.items()}
    for kind, name, known in (("matmul", c.matmul, matmuls), ("attention", c.attention, attentions)):
        if name not in known:
            raise KernelUnavailable(f"ops.{kind}={name!r} does not exist; use one of {sorted(known)} with --ops.{kind}")
        if name != "xla" and where != "gpu":
            raise KernelUnavailable(
                f"ops.{kind}={name} needs NVIDIA GPUs, the mesh is of {where} devices; use --ops.{kind} xla"
            )
    head = functools.partial(head_xla, mesh=mesh)
    return Ops(mesh=mesh, matmul=matmuls[c.matmul], attention=attentions[c.attention], head=head)


def check_ops(c: OpsConfig) -> None:
    """Try on this machine's own devices what may look right and be something else. Raises KernelUnavailable."""
    if c.matmul in FP8:
        check_products(c.matmul, FP8[c.matmul])
    if c.attention in PACKED:
        check_packed(c.attention, PACKED[c.attention])
