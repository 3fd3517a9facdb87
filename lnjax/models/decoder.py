"""The whole Llama and Nemotron-NAS family as one decoder.

`ModelSpec.blocks` lists the blocks that do something; consecutive equal ones form a run whose parameters carry a leading
layer dim and are executed by one `lax.scan`. A block without attention or without FFN simply has no such part.

Parameters live in one nested dict (`init_params`, `abstract_params`), so the model is a pure function of it.
Kernels are [in, out]; embedding and head are [V, D].
"""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from lnjax.mesh import RULES, constrain, platform, positions_axis
from lnjax.models.abstract import abstract
from lnjax.models.lora import LORA, Adapter, adapt, merge
from lnjax.models.rope import rope_tables, rotate
from lnjax.models.spec import Run, runs
from lnjax.ops.embed import embed_xla
from lnjax.ops.head import HeadOutput
from lnjax.ops.matmul import PRODUCT, matmul_xla
from lnjax.ops.select import Ops
from lnjax.schema import LoraConfig, ModelSpec

Params = Any
"""Nested dict of arrays: embed, final_norm, head (untied), runs/<i>/{attention,ffn}/<name>."""

UNROLL = {"cpu": 8, "gpu": 1}
"""Layers of a run in one turn of its loop; above 1, training all weights has no loop: it computes with `Model.unstack`ed
parameters. On a CPU a loop costs copies of every kernel, gradient and activation that go in and out of a stack."""

Attend = Callable[[Array, Array, Array], Array]
"""(q_BTNH, k_BTKH, v_BTKH), rotated -> [B, T, N, H]."""


@dataclass(frozen=True, slots=True)
class Compute:
    """How a forward pass runs, apart from what it computes."""

    ops: Ops
    dtype: jnp.dtype
    remat: str = "none"


def gather(x: Array, logical: Sequence[str | None], c: Compute) -> Array:
    """A parameter in compute dtype, whole over the axes that shard its width. It is cast first: half the bytes to move."""
    narrow = constrain(x.astype(c.dtype), c.ops.mesh, *logical)
    return constrain(narrow, c.ops.mesh, *(a if a != "embed" else None for a in logical))


def _place(x_BTD: Array, c: Compute, *, between_blocks: bool) -> Array:
    """Activations over their devices: positions split over tensor too between blocks, whole over it inside."""
    axis = positions_axis(c.ops.mesh, num_tokens=x_BTD.shape[1], between_blocks=between_blocks)
    return constrain(x_BTD, c.ops.mesh, "batch", axis, None)


class Kernels(nnx.Module):
    """Named parameters of one part, each with its logical axes; stacked over the run's layers."""

    lora_scale: float  # alpha / rank, where the part has adapters

    def __init__(self, shapes: dict[str, tuple[tuple[int, ...], tuple[str | None, ...]]], *, scale: float, rngs):
        for name, (shape, logical) in shapes.items():
            value = jnp.ones(shape) if name == "norm" else scale * jax.random.normal(rngs.params(), shape)
            setattr(self, name, nnx.Param(value, logical=logical))

    def use(self, name: str, c: Compute) -> Array:
        """The kernel of one layer in compute dtype, gathered over fsdp and context (still split over tensor)."""
        param = getattr(self, name)
        return gather(param[...], param.get_metadata()["logical"][1:], c)

    def project(self, x: Array, name: str, c: Compute) -> Array:
        """Through the kernel of one layer, and through its adapter (W x + s B A x, arXiv 2106.09685) where it has one."""
        y = c.ops.matmul(x, self.use(name, c), getattr(self, name).get_metadata()["logical"][1:])
        if not hasattr(self, f"{name}_a"):
            return y
        a, b = self.use(f"{name}_a", c), self.use(f"{name}_b", c)
        return y + self.lora_scale * matmul_xla(matmul_xla(x, a), b)

    def enter(self, x_BTD: Array, eps: float, c: Compute) -> Array:
        """The normed residual stream, gathered over tensor."""
        x = _place(rms_norm(x_BTD, self.use("norm", c), eps=eps), c, between_blocks=True)
        return _place(x, c, between_blocks=False)

    def leave(self, y_BTD: Array, c: Compute) -> Array:
        """A branch's result, split over positions again. Like `enter` it pins the layout, so that the backward pass gathers
        activations and never kernels."""
        return _place(y_BTD, c, between_blocks=True)


class Attention(Kernels):
    """Grouped-query attention with its input norm; `__call__` returns the residual branch."""

    def __init__(self, run: Run, spec: ModelSpec, *, rngs):
        n, d = len(run.blocks), spec.d_model
        assert run.attention
        q, kv = spec.num_heads * spec.head_dim, run.attention.num_kv_heads * spec.head_dim
        kernel = ("layers", "embed", "heads")
        super().__init__(
            {
                "norm": ((n, d), ("layers", None)),
                "q": ((n, d, q), kernel),
                "k": ((n, d, kv), kernel),
                "v": ((n, d, kv), kernel),
                "o": ((n, q, d), ("layers", "heads", "embed")),
            },
            scale=spec.initializer_range,
            rngs=rngs,
        )
        self.head_dim, self.eps = spec.head_dim, spec.rms_eps

    def __call__(self, x_BTD: Array, rope: tuple[Array, Array], attend: Attend, c: Compute) -> Array:
        x = self.enter(x_BTD, self.eps, c)
        shape = (*x.shape[:-1], -1, self.head_dim)
        q, k, v = (self.project(x, name, c).reshape(shape) for name in ("q", "k", "v"))
        out = attend(rotate(q, rope), rotate(k, rope), v)
        return self.leave(self.project(out.reshape(*x.shape[:-1], -1), "o", c), c)


class Ffn(Kernels):
    """SwiGLU with its input norm; `__call__` returns the residual branch."""

    def __init__(self, run: Run, spec: ModelSpec, *, rngs):
        assert run.ffn
        n, d, f = len(run.blocks), spec.d_model, run.ffn.width
        super().__init__(
            {
                "norm": ((n, d), ("layers", None)),
                "gate": ((n, d, f), ("layers", "embed", "ffn")),
                "up": ((n, d, f), ("layers", "embed", "ffn")),
                "down": ((n, f, d), ("layers", "ffn", "embed")),
            },
            scale=spec.initializer_range,
            rngs=rngs,
        )
        self.eps = spec.rms_eps

    def __call__(self, x_BTD: Array, c: Compute) -> Array:
        x = self.enter(x_BTD, self.eps, c)
        gated = jax.nn.silu(self.project(x, "gate", c)) * self.project(x, "up", c)
        return self.leave(self.project(gated, "down", c), c)


class Blocks(nnx.Module):
    """One run: equal blocks, stacked."""

    def __init__(self, run: Run, spec: ModelSpec, *, rngs):
        if run.attention:
            self.attention = Attention(run, spec, rngs=rngs)
        if run.ffn:
            self.ffn = Ffn(run, spec, rngs=rngs)

    def __call__(self, x_BTD: Array, rope: tuple[Array, Array], attend: Attend, c: Compute) -> Array:
        if hasattr(self, "attention"):
            with jax.named_scope("attention"):
                x_BTD = x_BTD + self.attention(x_BTD, rope, attend, c)
        if hasattr(self, "ffn"):
            with jax.named_scope("ffn"):
                x_BTD = x_BTD + self.ffn(x_BTD, c)
        return x_BTD


class Decoder(nnx.Module):
    """Embedding, runs of blocks, final norm, head."""

    def __init__(self, spec: ModelSpec, *, rngs):
        def table() -> nnx.Param:
            value = spec.initializer_range * jax.random.normal(rngs.params(), (spec.vocab_size, spec.d_model))
            return nnx.Param(value, logical=("vocab", "embed"))

        self.embed = table()
        self.runs = nnx.Dict({str(i): Blocks(run, spec, rngs=rngs) for i, run in enumerate(runs(spec))})
        self.final_norm = nnx.Param(jnp.ones((spec.d_model,)), logical=(None,))
        if not spec.tied_embeddings:
            self.head = table()


@functools.cache
def _abstract(spec: ModelSpec, lora: LoraConfig | None = None) -> Decoder:
    return nnx.eval_shape(lambda: adapt(Decoder(spec, rngs=nnx.Rngs(params=0)), lora, rngs=nnx.Rngs(params=0)))


def rms_norm(x: Array, weight: Array, *, eps: float) -> Array:
    """Root mean square norm (arXiv 1910.07467), statistics in float32."""
    y = x.astype(jnp.float32)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, axis=-1, keepdims=True) + eps)
    return y.astype(x.dtype) * weight.reshape((1,) * (x.ndim - 1) + weight.shape)


@dataclass(frozen=True, slots=True)
class Model:
    """A spec bound to a way of computing. Holds no arrays."""

    spec: ModelSpec
    compute: Compute
    lora: LoraConfig | None = None
    """Adapters that training makes; a tree of parameters has them or not."""

    def init_params(self, key: Array, *, dtype: jnp.dtype) -> Params:
        """Random weights (normal, `initializer_range`), born sharded. The same key gives the same weights on any mesh."""

        def init(key):
            decoder = Decoder(self.spec, rngs=nnx.Rngs(params=key))
            params = nnx.to_pure_dict(nnx.state(decoder, nnx.Param))
            return jax.tree.map(lambda x: x.astype(dtype), params)

        return jax.jit(init, out_shardings=self.shardings())(key)

    def abstract_params(self, *, dtype: jnp.dtype) -> Params:
        """The tree as jax.ShapeDtypeStruct with shardings. Raises ConfigError where the mesh does not divide a dim."""
        return abstract(nnx.state(_abstract(self.spec), nnx.Param), dtype=dtype, mesh=self.compute.ops.mesh)

    def abstract_trained(self, *, dtype: jnp.dtype) -> Params:
        """What training changes, likewise: all parameters, or adapters alone (`{LORA: ...}`)."""
        if self.lora is None:
            return self.abstract_params(dtype=dtype)
        adapters = nnx.state(_abstract(self.spec, self.lora), Adapter)
        return {LORA: abstract(adapters, dtype=dtype, mesh=self.compute.ops.mesh)}

    def abstract_frozen(self) -> Params:
        """The rest, in compute dtype; `{}` without adapters. `frozen | trained` is what the model computes with."""
        return self.abstract_params(dtype=self.compute.dtype) if self.lora else {}

    def init_adapters(self, key: Array, *, dtype: jnp.dtype) -> Params:
        """New adapters, born sharded, under which the model computes what it does without them."""

        def init(key):
            rngs = nnx.Rngs(params=key)
            decoder = adapt(Decoder(self.spec, rngs=rngs), self.lora, rngs=rngs)
            return {LORA: jax.tree.map(lambda x: x.astype(dtype), nnx.to_pure_dict(nnx.state(decoder, Adapter)))}

        return jax.jit(init, out_shardings=jax.tree.map(lambda x: x.sharding, self.abstract_trained(dtype=dtype)))(key)

    def merged(self, params: Params) -> Params:
        """Parameters without adapters, the same model."""
        return merge(params, self.lora) if self.lora else params

    def shardings(self) -> Params:
        """NamedSharding of every parameter."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_params(dtype=jnp.dtype("float32")))

    def stacks(self, params: Params) -> list["Blocks"]:
        """The runs as modules over `params`, each still stacked over its layers."""
        graph, state = nnx.split(_abstract(self.spec, self.lora if LORA in params else None))
        nnx.replace_by_pure_dict(state, {k: v for k, v in params.items() if k != LORA})
        nnx.replace_by_pure_dict(state, params.get(LORA, {}))
        decoder = nnx.merge(graph, state)
        return [decoder.runs[str(i)] for i in range(len(runs(self.spec)))]

    def unstack(self, params: Params) -> Params:
        """The same tree, of arrays or ShapeDtypeStructs, with `runs` replaced by `layers`: one dict a block, without the layer
        dim."""
        layers = []
        for i, run in enumerate(runs(self.spec)):
            for j in range(len(run.blocks)):
                layers.append(jax.tree.map(functools.partial(_layer, index=j), params["runs"][str(i)]))
        return {k: v for k, v in params.items() if k != "runs"} | {"layers": layers}

    def stack(self, unstacked: Params) -> Params:
        """The tree that `unstack` was given."""
        left, stacks = iter(unstacked["layers"]), {}
        for i, run in enumerate(runs(self.spec)):
            stacks[str(i)] = jax.tree.map(lambda *x: jnp.stack(x), *(next(left) for _ in run.blocks))
        return {k: v for k, v in unstacked.items() if k != "layers"} | {"runs": stacks}

    def by_layer(self) -> tuple[Callable[[Params], Params], Callable[[Params], Params]] | None:
        """(unstack, stack) where training computes with unstacked parameters."""
        unrolled = UNROLL[platform(self.compute.ops.mesh)] > 1 and self.lora is None
        return (self.unstack, self.stack) if unrolled else None

    def layers(self, unstacked: Params) -> list["Blocks"]:
        """One module a block, over what `unstack` returned."""
        modules = []
        for i, run in enumerate(runs(self.spec)):
            graph, state = nnx.split(_abstract(self.spec).runs[str(i)])
            for _ in run.blocks:
                nnx.replace_by_pure_dict(state, unstacked["layers"][len(modules)])
                modules.append(nnx.merge(graph, state))
        return modules

    def unstacked_shardings(self) -> Params:
        """Of `unstack`ed parameters that are whole on every device but for the tensor axis."""
        mesh = self.compute.ops.mesh

        def place(x: jax.ShapeDtypeStruct) -> NamedSharding:
            spec = (None if axes == RULES["embed"] else axes for axes in x.sharding.spec)
            return NamedSharding(mesh, PartitionSpec(*spec))

        return jax.tree.map(place, self.unstack(self.abstract_params(dtype=jnp.dtype("float32"))))

    def embed(self, params: Params, tokens_BT: Array) -> Array:
        c = self.compute
        table = gather(params["embed"], ("vocab", "embed"), c)
        with jax.named_scope("embed"):
            return embed_xla(table, tokens_BT, mesh=c.ops.mesh)

    def final_norm(self, params: Params, x_BTD: Array) -> Array:
        return rms_norm(x_BTD, params["final_norm"].astype(self.compute.dtype), eps=self.spec.rms_eps)

    def head_weight(self, params: Params) -> Array:
        """[V, D] in compute dtype, split over tensor only."""
        w = params["embed"] if self.spec.tied_embeddings else params["head"]
        return gather(w, ("vocab", "embed"), self.compute)

    def hidden(self, params: Params, tokens_BT: Array, positions_BT: Array, segments_BT: Array) -> Array:
        """Final-norm hidden states [B, T, D] of packed rows. `params` may be `unstack`ed."""
        c, rope = self.compute, rope_tables(self.spec, positions_BT)

        def attend(q, k, v):
            return c.ops.attention(q, k, v, segments_BT)

        x = self.embed(params, tokens_BT)
        stacked = "layers" not in params
        for module in self.stacks(params) if stacked else self.layers(params):
            graph, *kernels = nnx.split(module, Adapter if LORA in params else nnx.Param, ...)

            def layer(x, params_of_layer, graph=graph):
                trained, frozen = params_of_layer
                x, trained = _settle((x, trained))
                return nnx.merge(graph, trained, frozen)(x, rope, attend, c), None

            length = len(jax.tree.leaves(kernels)[0]) if stacked else 1
            layer = _remat(layer, c.remat, length=length)
            if stacked:
                x, _ = jax.lax.scan(layer, x, kernels, unroll=UNROLL[platform(c.ops.mesh)])
            else:
                x, _ = layer(x, kernels)
        return self.final_norm(params, x)

    def logprobs(
        self,
        params: Params,
        tokens_BT: Array,
        positions_BT: Array,
        segments_BT: Array,
        *,
        temperature: float = 1.0,
        wanted_BT: Array | None = None,
    ) -> HeadOutput:
        """HeadOutput for every token given those before it in its segment; 0 at the first of a segment or branch, padding, and
        where `wanted_BT` (positive where the output is read; None: everywhere) is not."""
        x = self.hidden(params, tokens_BT, positions_BT, segments_BT)
        inner = (positions_BT > 0) & (segments_BT > 0) & (segments_BT == jnp.roll(segments_BT, 1, axis=1))
        if wanted_BT is not None:
            inner &= wanted_BT > 0
        targets, wanted = (jnp.roll(a, -1, axis=1) for a in (tokens_BT, inner))
        with jax.named_scope("head"):
            out = self.compute.ops.head(x, self.head_weight(params), targets, temperature=temperature, wanted_BT=wanted)
        return HeadOutput(*(jnp.roll(a, 1, axis=1) for a in out))

    def logits(self, params: Params, tokens_BT: Array) -> Array:
        """[B, T, V] float32 of unpacked rows; for checks on short inputs only."""
        positions = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1])[None], tokens_BT.shape)
        x = self.hidden(params, tokens_BT, positions, jnp.ones_like(tokens_BT))
        return jnp.einsum("btd,vd->btv", x, self.head_weight(params), preferred_element_type=jnp.float32)


def _layer(stacked: Any, *, index: int) -> Any:
    """One layer of a stacked parameter, or of what stands for one."""
    if not isinstance(stacked, jax.ShapeDtypeStruct):
        return stacked[index]
    mesh, spec = stacked.sharding.mesh, stacked.sharding.spec
    return jax.ShapeDtypeStruct(
        stacked.shape[1:], stacked.dtype, sharding=NamedSharding(mesh, PartitionSpec(*spec[1:]))
    )


@jax.custom_vjp
def _settle(tree: Any) -> Any:
    """Its argument. In the backward pass a layer's gradients are all made before the layer below begins: a run of one
    layer is no loop, and the compiler would put its weight gradients off, keeping all that they need."""
    return tree


_settle.defvjp(lambda tree: (tree, None), lambda _, g: (jax.lax.optimization_barrier(g),))


def _remat(layer: Callable, policy: str, *, length: int) -> Callable:
    if policy == "none":
        return layer
    # A loop keeps the compiler from merging the recomputation with the first pass; a loop over one layer is no loop.
    return jax.checkpoint(layer, policy=_keep_dots if policy == "dots" else None, prevent_cse=length == 1)


def _keep_dots(primitive: Any, *args: Any, **params: Any) -> Any:
    """Matmul outputs (of FP8 products what they are cast to, not their float32), and what cuDNN's attention leaves for its
    backward pass, Transformer Engine's too."""
    if primitive.name == "name":
        return params["name"] == PRODUCT
    if primitive.name.startswith(("dot_product_attention_fwd", "te_gemm", "te_fused_attn_forward")):
        return True
    wide = not args or args[0].dtype.itemsize > 1
    return wide and jax.checkpoint_policies.dots_with_no_batch_dims_saveable(primitive, *args, **params)
