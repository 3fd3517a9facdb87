"""The four Llama-Nemotron architectures, block by block.

Sources: nano4b and nano8b: model cards of Llama-3.1-Nemotron-Nano-4B-v1.1 and -8B-v1 (plain Llamas); super49b and ultra253b:
`llama_nemotron_config.py` of NVIDIA-NeMo/NeMo (the searched blocks), arXiv 2505.00949. Imports no jax.
"""

from lnjax.errors import ConfigError
from lnjax.schema import AttentionSpec, BlockSpec, FfnSpec, ModelSpec, RopeSpec, uniform_blocks

NUM_KV_HEADS = 8
SUPER = (
    "A14336 5*A28672 2*-14336 3*A28672 -17920 30*A28672 -7168 2*-14336 -7168 -28672 -7168 -14336 3*-7168 A28672 -7168 "
    "2*-5632 -7168 3*-5632 2*-7168 2*-2816 2*-5632 2*-2816 -5632 2*-2816 9*A28672"
)
ULTRA = (
    "A5376 A10752 6*A16128 A21504 4*. 3*A21504 2*A53248 6*. 3*A53248 5*. 3*A53248 A26624 3*. 3*A21504 -21504 A53248 "
    "-53248 5*. 4*A53248 5*. 4*A53248 5*. 4*A53248 5*. 4*A53248 5*. A53248 3*A37376 2*. A32000 3*A26624 2*-26624 A26624 . "
    "7*-26624 A26624 5*. A32000 A53248 -53248 A53248 8*. -399360 8*. -425984 8*. -343040 5*. -301056 -21504 A21504 A26624 "
    ". 2*A26624 A37376 4*A53248 A26624"
)
"""The four widest are fused from neighbouring FFNs (arXiv 2503.18908)."""


def searched_blocks(text: str, *, num_kv_heads: int = NUM_KV_HEADS) -> tuple[tuple[BlockSpec, ...], int]:
    """(blocks that do something, layers counted). `N*` repeats, `A` has attention, `-` has none, a number is the FFN's
    width, `.` is an empty layer."""
    layers: list[str] = []
    for word in text.split():
        count, star, kind = word.rpartition("*")
        layers += [kind] * (int(count) if star else 1)
    blocks = []
    for i, kind in enumerate(layers):
        if kind == ".":
            continue
        attention = AttentionSpec(num_kv_heads) if kind[0] == "A" else None
        blocks.append(BlockSpec(i, attention, FfnSpec(int(kind[1:])) if kind[1:] else None))
    return tuple(blocks), len(layers)


def _spec(*, d_model: int, num_heads: int, blocks: tuple[BlockSpec, ...], layers: int, rope_factor: float) -> ModelSpec:
    """What the family has in common: Llama-3.1's vocabulary, head width, rope and ends of turns."""
    return ModelSpec(
        vocab_size=128256,
        d_model=d_model,
        num_heads=num_heads,
        head_dim=128,
        blocks=blocks,
        num_source_layers=layers,
        tied_embeddings=False,
        rope=RopeSpec(theta=500000.0, factor=rope_factor),
        max_position=131072,
        bos_token_id=128000,
        eos_token_ids=(128001, 128008, 128009),
    )


def family(name: str) -> ModelSpec:
    """`nano4b`, `nano8b`, `super49b` or `ultra253b`. Raises ConfigError for another name."""
    if name in ("nano4b", "nano8b"):
        d_model, ffn = (3072, 9216) if name == "nano4b" else (4096, 14336)
        blocks = uniform_blocks(num_layers=32, num_kv_heads=NUM_KV_HEADS, ffn=ffn)
        return _spec(d_model=d_model, num_heads=32, blocks=blocks, layers=32, rope_factor=8.0)
    if name == "super49b":
        blocks, layers = searched_blocks(SUPER)
        return _spec(d_model=8192, num_heads=64, blocks=blocks, layers=layers, rope_factor=8.0)
    if name == "ultra253b":
        blocks, layers = searched_blocks(ULTRA)
        return _spec(d_model=16384, num_heads=128, blocks=blocks, layers=layers, rope_factor=16.0)
    raise ConfigError(f"no model {name!r} in the family; there are nano4b, nano8b, super49b, ultra253b")
