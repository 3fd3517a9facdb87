"""Runs: maximal sequences of equal consecutive blocks, and the shapes of their parameters. Imports no jax."""

import functools
from dataclasses import dataclass
from typing import Any

from lnjax.schema import AttentionSpec, BlockSpec, FfnSpec, ModelSpec

REWARD_HEAD = "reward_head"
"""A reward model's parameter beside the decoder's, [A, D]."""


@dataclass(frozen=True, slots=True)
class Run:
    """Blocks that differ only in `source_layer`; their parameters are stacked."""

    blocks: tuple[BlockSpec, ...]

    @property
    def attention(self) -> AttentionSpec | None:
        return self.blocks[0].attention

    @property
    def ffn(self) -> FfnSpec | None:
        return self.blocks[0].ffn


@functools.cache
def runs(spec: ModelSpec) -> tuple[Run, ...]:
    """The decoder's blocks, grouped into runs, in order."""
    grouped: list[list[BlockSpec]] = []
    for block in spec.blocks:
        if grouped and (grouped[-1][0].attention, grouped[-1][0].ffn) == (block.attention, block.ffn):
            grouped[-1].append(block)
        else:
            grouped.append([block])
    return tuple(Run(tuple(blocks)) for blocks in grouped)


def param_shapes(spec: ModelSpec) -> dict[str, Any]:
    """Nested dict of shape tuples, in the layout of `lnjax.models.decoder`."""
    d = spec.d_model
    tree: dict[str, Any] = {"embed": (spec.vocab_size, d), "final_norm": (d,), "runs": {}}
    if not spec.tied_embeddings:
        tree["head"] = (spec.vocab_size, d)
    for i, run in enumerate(runs(spec)):
        n = len(run.blocks)
        part: dict[str, dict[str, tuple[int, ...]]] = {}
        if run.attention:
            q, kv = spec.num_heads * spec.head_dim, run.attention.num_kv_heads * spec.head_dim
            part["attention"] = {"norm": (n, d), "q": (n, d, q), "k": (n, d, kv), "v": (n, d, kv), "o": (n, q, d)}
        if run.ffn:
            f = run.ffn.width
            part["ffn"] = {"norm": (n, d), "gate": (n, d, f), "up": (n, d, f), "down": (n, f, d)}
        tree["runs"][str(i)] = part
    return tree
