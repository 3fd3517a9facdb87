"""What is timed: models, and the work of one step by seed. Every arm of every case gets the same."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from lnjax.data.packing import Packing, pack
from lnjax.errors import ConfigError
from lnjax.models.family import family
from lnjax.schema import ModelSpec, PackConfig, RopeSpec, uniform_blocks
from lnjax.types import Sample

SIGMA = 0.8
"""Of the lognormal lengths; their median is a fifth of a row."""
SHORTEST = 16
NUM_BATCHES = 4
"""Batches of a workload; step k takes batch k modulo this."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    spec: ModelSpec
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Compute; master weights and optimizer state are float32 for training, else of this dtype."""
    remat: Literal["none", "dots", "full"] = "none"
    lora_rank: int = 0
    """Where positive, adapters alone are trained and the weights below them are of `dtype`. The other arms know no adapters."""
    cpu_devices: int = 2
    """XLA devices that a CPU is, but for SFT (two): two share the work between products, one reads the weights once."""
    conversations: int = 64
    """Of one update (sft)."""
    row_tokens: int = 512
    microbatch_rows: int = 2
    """Packed rows of one pass."""
    padded_rows: int = 8
    """Padded conversations of one pass (the default arm; 8 is HF Trainer's)."""
    prompts: int = 8
    samples: int = 8
    """prompts x samples sequences are sampled together (decode, grpo)."""
    prompt_tokens: int = 64
    new_tokens: int = 128


def _llama(layers: int, d: int, heads: int, kv: int, ffn: int, vocab: int, *, tied: bool = True, **rest) -> ModelSpec:
    return ModelSpec(
        vocab_size=vocab,
        d_model=d,
        num_heads=heads,
        head_dim=d // heads,
        blocks=uniform_blocks(num_layers=layers, num_kv_heads=kv, ffn=ffn),
        num_source_layers=layers,
        tied_embeddings=tied,
        rope=RopeSpec(theta=500_000.0),
        max_position=32_768,
        **rest,
    )


def shape(name: str) -> Shape:
    """Raises ConfigError for a name that does not exist."""
    gpu = {"dtype": "bfloat16", "remat": "dots", "row_tokens": 8192, "conversations": 4, "padded_rows": 1}
    known = {
        "micro": lambda: Shape(
            spec=_llama(2, 64, 2, 1, 128, 256),
            conversations=8,
            row_tokens=128,
            prompts=2,
            samples=2,
            prompt_tokens=16,
            new_tokens=16,
        ),
        "tiny": lambda: Shape(spec=_llama(8, 256, 4, 2, 704, 4096)),
        "smollm2": lambda: Shape(
            spec=_llama(30, 576, 9, 3, 1536, 49152), cpu_devices=1, conversations=16, new_tokens=64
        ),
        "1b": lambda: Shape(spec=_llama(16, 2048, 32, 8, 8192, 128256), microbatch_rows=1, **gpu),
        "3b": lambda: Shape(spec=_llama(28, 3072, 24, 8, 8192, 128256), microbatch_rows=1, **gpu),
        "8b": lambda: Shape(
            spec=family("nano8b"), microbatch_rows=1, prompts=32, prompt_tokens=896, new_tokens=128, **gpu
        ),
        "8b-lora": lambda: Shape(spec=family("nano8b"), microbatch_rows=1, lora_rank=16, **{**gpu, "remat": "full"}),
        "layer-4096": lambda: Shape(
            spec=_llama(1, 4096, 32, 8, 14336, 128256), microbatch_rows=2, **{**gpu, "remat": "none"}
        ),
    }
    if name not in known:
        raise ConfigError(f"bench: no shape {name!r}; use one of {', '.join(known)}")
    return known[name]()


def conversations(s: Shape, *, seed: int, dense: bool) -> list[list[Sample]]:
    """NUM_BATCHES batches. Ragged: lognormal lengths, a third to two thirds of each is the answer and trained on.
    Dense: whole rows, all of it trained on."""
    draw = np.random.default_rng(seed)
    batches = []
    for _ in range(NUM_BATCHES):
        sizes = np.exp(draw.normal(np.log(s.row_tokens / 5), SIGMA, s.conversations)).astype(int)
        sizes = np.full_like(sizes, s.row_tokens) if dense else sizes.clip(SHORTEST, s.row_tokens)
        asked = np.ones_like(sizes) if dense else (sizes * draw.uniform(1 / 3, 2 / 3, s.conversations)).astype(int)
        tokens = [tuple(draw.integers(0, s.spec.vocab_size, size).tolist()) for size in sizes]
        batches.append([Sample(t, (0,) * n + (1,) * (len(t) - n)) for t, n in zip(tokens, asked.tolist(), strict=True)])
    return batches


def packed(s: Shape, batch: list[Sample]) -> Packing:
    return pack([[x] for x in batch], c=PackConfig(row_tokens=s.row_tokens, microbatch_rows=s.microbatch_rows))


def prompt_ids(s: Shape, *, seed: int) -> list[tuple[int, ...]]:
    draw = np.random.default_rng(seed)
    return [tuple(draw.integers(0, s.spec.vocab_size, s.prompt_tokens).tolist()) for _ in range(s.prompts)]
