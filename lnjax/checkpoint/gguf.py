"""GGUF files of the llama architecture: spec, and tensors under their Hugging Face names, dequantized to float32."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize

from lnjax.errors import WeightsError
from lnjax.schema import ModelSpec, RopeSpec, uniform_blocks

TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
ROPE_FREQS = "rope_freqs.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position": 8192}


class GgufFile:
    """Same reading interface as a safetensors folder."""

    def __init__(self, path: Path):
        self._path = path
        try:
            self._reader = GGUFReader(str(path))
        except (ValueError, IndexError, KeyError) as error:
            raise WeightsError(f"{path}: truncated or not a GGUF file ({error}); fetch it again") from error
        if self._field("general.architecture") != "llama":
            raise WeightsError(
                f"{path}: architecture {self._field('general.architecture')!r}, only `llama` is supported"
            )
        self._tensors = {}
        for tensor in self._reader.tensors:
            if tensor.name != ROPE_FREQS:
                self._tensors[self._hf_name(tensor.name)] = tensor
        self._last: tuple[str, np.ndarray] | None = None

    def _field(self, name: str, default: Any = None) -> Any:
        field = self._reader.fields.get(name)
        if field is None and default is None:
            raise WeightsError(f"{self._path}: no {name} in its metadata")
        return default if field is None else field.contents()

    def _hf_name(self, name: str) -> str:
        parts = name.split(".")
        if parts[0] == "blk" and len(parts) == 4 and parts[2] in BLOCK and parts[3] == "weight":
            return f"model.layers.{parts[1]}.{BLOCK[parts[2]]}.weight"
        if len(parts) == 2 and parts[0] in TOP and parts[1] == "weight":
            return f"{TOP[parts[0]]}.weight"
        raise WeightsError(f"{self._path}: unknown tensor {name}; only plain Llama weights are supported")

    def spec(self) -> ModelSpec:
        heads, d_model = self._field("llama.attention.head_count"), self._field("llama.embedding_length")
        layers = self._field("llama.block_count")
        head_dim = self._field("llama.rope.dimension_count", d_model // heads)
        kv_heads, ffn = self._field("llama.attention.head_count_kv", heads), self._field("llama.feed_forward_length")
        eos = self._field("tokenizer.ggml.eos_token_id", -1)
        bos = self._field("tokenizer.ggml.bos_token_id", -1)
        # Stored as float32; the shortest decimal that rounds to it is what was meant (1e-05, not 9.99e-06).
        eps = float(str(np.float32(self._field("llama.attention.layer_norm_rms_epsilon"))))
        return ModelSpec(
            vocab_size=self.shape("model.embed_tokens.weight")[0],
            d_model=d_model,
            num_heads=heads,
            head_dim=head_dim,
            blocks=uniform_blocks(num_layers=layers, num_kv_heads=kv_heads, ffn=ffn),
            num_source_layers=layers,
            tied_embeddings="lm_head.weight" not in self._tensors,
            rms_eps=eps,
            rope=self._rope(head_dim=head_dim),
            max_position=self._field("llama.context_length"),
            bos_token_id=None if bos < 0 else bos,
            eos_token_ids=() if eos < 0 else (eos,),
        )

    def _rope(self, *, head_dim: int) -> RopeSpec:
        """Llama 3 scaling is stored as one divisor a frequency; it must be the published rule for some factor."""
        theta = float(self._field("llama.rope.freq_base", 10000.0))
        stored = next((t for t in self._reader.tensors if t.name == ROPE_FREQS), None)
        if stored is None:
            return RopeSpec(theta=theta)
        divisors = np.asarray(stored.data, np.float64).ravel()
        rope = RopeSpec(theta=theta, factor=float(divisors.max()), **LLAMA3)
        inverse = theta ** (-np.arange(0, head_dim, 2) / head_dim)
        turns = rope.original_max_position * inverse / (2 * math.pi)
        keep = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
        keep = np.clip(keep, 0.0, 1.0)
        if not np.allclose(divisors, 1 / (keep + (1 - keep) / rope.factor), rtol=1e-4):
            raise WeightsError(
                f"{self._path}: {ROPE_FREQS} is not Llama 3's rule; use the model in Hugging Face format"
            )
        return rope

    def names(self) -> list[str]:
        return list(self._tensors)

    def where(self, name: str) -> str:
        return str(self._path)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(int(n) for n in self._tensors[name].shape[::-1])

    def read(self, name: str, index: Sequence[slice]) -> np.ndarray:
        """That part of the tensor, float32."""
        if self._last is None or self._last[0] != name:
            tensor = self._tensors[name]
            values = dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
            values = values.reshape(self.shape(name))
            for part, key in (("q_proj", "llama.attention.head_count"), ("k_proj", "llama.attention.head_count_kv")):
                if f"self_attn.{part}" in name:
                    values = _unpermute(values, heads=self._field(key, self._field("llama.attention.head_count")))
            self._last = name, values
        return self._last[1][tuple(index)]


def _unpermute(weight: np.ndarray, *, heads: int) -> np.ndarray:
    """Undo llama.cpp's row order for interleaved rotary embedding: [heads, H/2, 2] rows back to halves."""
    rows, columns = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)
