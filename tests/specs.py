"""Small architectures that several tests share."""

from lnjax.schema import AttentionSpec, BlockSpec, FfnSpec, ModelSpec, RopeSpec, uniform_blocks


def llama(**changes) -> ModelSpec:
    """Two layers, grouped-query attention, head_dim x heads != d_model."""
    return ModelSpec(
        **{
            "vocab_size": 160,
            "d_model": 32,
            "num_heads": 4,
            "head_dim": 16,
            "blocks": uniform_blocks(num_layers=2, num_kv_heads=2, ffn=64),
            "num_source_layers": 2,
            "tied_embeddings": True,
            "max_position": 128,
            "bos_token_id": 1,
            "eos_token_ids": (2,),
            **changes,
        }
    )


def nemotron(**changes) -> ModelSpec:
    """Absent attention, absent FFN, an empty layer (number 2), two FFN widths, two numbers of kv heads, llama3 rope."""
    blocks = (
        BlockSpec(0, AttentionSpec(2), FfnSpec(64)),
        BlockSpec(1, None, FfnSpec(96)),
        BlockSpec(3, AttentionSpec(4), None),
        BlockSpec(4, AttentionSpec(2), FfnSpec(64)),
        BlockSpec(5, AttentionSpec(2), FfnSpec(64)),
    )
    rope = RopeSpec(theta=10000.0, factor=8.0, original_max_position=32)
    return llama(**{"blocks": blocks, "num_source_layers": 6, "tied_embeddings": False, "rope": rope, **changes})
