"""What a decoder is made of: blocks, rotary embedding, vocabulary. Configs take these names from lnjax.schema. No jax."""

from dataclasses import dataclass

from lnjax.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeSpec:
    """Rotary position embedding; `llama3` scaling when factor > 1 (Llama 3.1 model card)."""

    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position: int = 8192


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    num_kv_heads: int


@dataclass(frozen=True, slots=True)
class FfnSpec:
    width: int


@dataclass(frozen=True, slots=True)
class BlockSpec:
    """One transformer block. None is a no-op: neither its norm nor its weights exist."""

    source_layer: int
    """Index in the checkpoint's names (`model.layers.N`)."""
    attention: AttentionSpec | None
    ffn: FfnSpec | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSpec:
    """Architecture of a Llama or Nemotron-NAS decoder."""

    vocab_size: int
    d_model: int
    num_heads: int
    head_dim: int
    blocks: tuple[BlockSpec, ...]
    """Blocks that do something; a block with neither part is left out (its number is a gap in source_layer)."""
    num_source_layers: int
    """Layers the checkpoint's config.json counts, empty ones included."""
    tied_embeddings: bool
    rms_eps: float = 1e-5
    rope: RopeSpec = RopeSpec()
    max_position: int = 8192
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    initializer_range: float = 0.02

    def __post_init__(self):
        if not self.blocks:
            raise ConfigError("ModelSpec.blocks is empty; a decoder needs at least one block")
        for block in self.blocks:
            if block.attention and self.num_heads % block.attention.num_kv_heads:
                raise ConfigError(
                    f"block {block.source_layer}: {block.attention.num_kv_heads} kv heads do not divide "
                    f"num_heads={self.num_heads}"
                )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even for rotary embedding")


def uniform_blocks(*, num_layers: int, num_kv_heads: int, ffn: int) -> tuple[BlockSpec, ...]:
    """Blocks of a plain Llama."""
    return tuple(BlockSpec(i, AttentionSpec(num_kv_heads), FfnSpec(ffn)) for i in range(num_layers))
