"""Which part of each checkpoint tensor a tensor-parallel rank serves, read off the model that vLLM built."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding


@dataclass(frozen=True)
class Slice:
    """One checkpoint tensor as this rank serves it."""

    name: str
    shape: tuple[int, ...]
    """Of the whole tensor."""
    axis: int
    start: int
    size: int
    """Along `axis`; the other dims are whole."""
    module: torch.nn.Module
    offset: int
    """First row in the module's weight, where several tensors are fused; 0 otherwise."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        return tuple(self.size if i == self.axis else s for i, s in enumerate(self.shape))

    def served(self) -> torch.Tensor | None:
        """The rows of the live weight, or None where it is packed or quantised and cannot be compared."""
        weight = getattr(self.module, "weight", None)
        if weight is None or weight.dim() != len(self.shape) or weight.dtype not in COMPARABLE:
            return None
        if weight.shape[1:] != self.local_shape[1:] or weight.shape[0] < self.offset + self.local_shape[0]:
            return None
        return weight.data[self.offset : self.offset + self.local_shape[0]]


COMPARABLE = (torch.float32, torch.bfloat16, torch.float16)


def slices_of(model: torch.nn.Module) -> dict[str, Slice]:
    """{tensor name: slice}, in the order of the model, each tensor once. Raises ValueError for a layer it does not know."""
    fused: Mapping[str, Sequence[str]] = model.packed_modules_mapping
    found: dict[str, Slice] = {}
    seen: set[int] = set()
    for path, module in model.named_modules():
        if id(module) in seen:
            continue  # tied embeddings
        seen.add(id(module))
        for item in _of_module(path, module, fused):
            found[item.name] = item
    if getattr(model.config, "tie_word_embeddings", False):
        found.pop("lm_head.weight", None)
    return found


def _of_module(path: str, module: torch.nn.Module, fused: Mapping[str, Sequence[str]]) -> list[Slice]:
    parent, _, last = path.rpartition(".")
    if isinstance(module, QKVParallelLinear):
        heads, width, rank = module.head_size, module.input_size, module.tp_rank
        counts = (module.num_heads, module.num_kv_heads, module.num_kv_heads)
        totals = (module.total_num_heads, module.total_num_kv_heads, module.total_num_kv_heads)
        ranks = (rank, rank // module.num_kv_head_replicas, rank // module.num_kv_head_replicas)
        items, offset = [], 0
        for name, count, total, part in zip(fused[last], counts, totals, ranks, strict=True):
            size = count * heads
            items.append(Slice(f"{parent}.{name}.weight", (total * heads, width), 0, part * size, size, module, offset))
            offset += size
        return items
    if isinstance(module, MergedColumnParallelLinear):
        items, offset = [], 0
        for name, total in zip(fused[last], module.output_sizes, strict=True):
            size = total // module.tp_size
            shape = (total, module.input_size)
            items.append(Slice(f"{parent}.{name}.weight", shape, 0, module.tp_rank * size, size, module, offset))
            offset += size
        return items
    if isinstance(module, RowParallelLinear):
        size = module.input_size_per_partition
        shape = (module.output_size, module.input_size)
        return [Slice(f"{path}.weight", shape, 1, module.tp_rank * size, size, module, 0)]
    if isinstance(module, ColumnParallelLinear):
        size = module.output_size // module.tp_size
        shape = (module.output_size, module.input_size)
        return [Slice(f"{path}.weight", shape, 0, module.tp_rank * size, size, module, 0)]
    if isinstance(module, LinearBase):
        raise ValueError(f"{path}: {type(module).__name__} is no layer of a Llama or DeciLM; cannot be updated")
    if isinstance(module, VocabParallelEmbedding):
        rows = module.shard_indices
        shape = (module.org_vocab_size, module.embedding_dim)
        size = rows.org_vocab_end_index - rows.org_vocab_start_index
        return [Slice(f"{path}.weight", shape, 0, rows.org_vocab_start_index, size, module, 0)]
    weight = module._parameters.get("weight")
    if weight is None:
        return []
    return [Slice(f"{path}.weight", tuple(weight.shape), 0, 0, weight.shape[0], module, 0)]
