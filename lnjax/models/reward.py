"""A reward model: a decoder's trunk, and a linear head on the hidden state of an answer's last token."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from lnjax.mesh import check_divisible, sharding
from lnjax.models.decoder import Model, Params, gather
from lnjax.models.spec import REWARD_HEAD
from lnjax.types import PackedBatch


@dataclass(frozen=True, slots=True)
class RewardModel:
    """Holds no arrays, as `Model`."""

    decoder: Model
    num_scores: int
    """A: 1, or one for each rating."""

    def init_params(self, params: Params) -> Params:
        """Parameters over a decoder's. A head of zeros prefers nothing: the first Bradley-Terry loss is ln 2."""
        dtype = params["embed"].dtype
        head = self.abstract_params(dtype=dtype)[REWARD_HEAD]
        zeros = jax.jit(lambda: jnp.zeros(head.shape, dtype), out_shardings=head.sharding)()
        return {k: v for k, v in params.items() if k != "head"} | {REWARD_HEAD: zeros}

    def abstract_params(self, *, dtype: Any) -> Params:
        """The tree as jax.ShapeDtypeStruct with shardings."""
        mesh, shape, logical = (
            self.decoder.compute.ops.mesh,
            (self.num_scores, self.decoder.spec.d_model),
            (None, "embed"),
        )
        check_divisible(mesh, name=REWARD_HEAD, shape=shape, logical=logical)
        head = jax.ShapeDtypeStruct(shape, dtype, sharding=sharding(mesh, *logical))
        trunk = self.decoder.abstract_params(dtype=dtype)
        return {k: v for k, v in trunk.items() if k != "head"} | {REWARD_HEAD: head}

    def shardings(self) -> Params:
        """Of every parameter."""
        return jax.tree.map(lambda x: x.sharding, self.abstract_params(dtype=self.decoder.compute.dtype))

    def scores(self, params: Params, packed: PackedBatch, last_BPK: Array) -> Array:
        """[B, P, K, A] float32 at the tokens in columns `last_BPK`."""
        trunk = {k: v for k, v in params.items() if k != REWARD_HEAD}
        x_BTD = self.decoder.hidden(trunk, packed.tokens_BT, packed.positions_BT, packed.segment_ids_BT)
        head = gather(params[REWARD_HEAD], (None, "embed"), self.decoder.compute)
        scores_BTA = jnp.einsum("btd,ad->bta", x_BTD, head, preferred_element_type=jnp.float32)
        columns = last_BPK.reshape(last_BPK.shape[0], -1, 1)
        return jnp.take_along_axis(scores_BTA, columns, axis=1).reshape(*last_BPK.shape, self.num_scores)
