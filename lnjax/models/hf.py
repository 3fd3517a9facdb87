"""How a ModelSpec is written in a Hugging Face config.json, and what its tensors are called. Imports no jax.

Two model types: `llama`, and `nemotron-nas` (DeciLMForCausalLM: `block_configs` with absent attention or FFN).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lnjax.errors import WeightsError
from lnjax.models.spec import REWARD_HEAD, param_shapes, runs
from lnjax.schema import AttentionSpec, BlockSpec, FfnSpec, ModelSpec, RopeSpec

ATTENTION = {"norm": "input_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj", "v": "self_attn.v_proj"}
ATTENTION |= {"o": "self_attn.o_proj"}
FFN = {"norm": "post_attention_layernorm", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj"}
FFN_MULTIPLE = 256


@dataclass(frozen=True, slots=True)
class TensorMap:
    """One parameter of ours and the tensors that make it up."""

    path: tuple[str, ...]
    shape: tuple[int, ...]
    names: tuple[str, ...]
    """One tensor, or one a layer where `stacked`."""
    stacked: bool
    transposed: bool
    """Stored [out, in] there, [in, out] here."""

    @property
    def tensor_shape(self) -> tuple[int, ...]:
        shape = self.shape[1:] if self.stacked else self.shape
        return shape[::-1] if self.transposed else shape


def tensor_map(spec: ModelSpec, *, num_scores: int = 0) -> list[TensorMap]:
    """Every parameter once, in the order of the decoder; with `num_scores` those of a reward model over it."""
    shapes = param_shapes(spec)
    found = [TensorMap(("embed",), shapes["embed"], ("model.embed_tokens.weight",), False, False)]
    for i, run in enumerate(runs(spec)):
        for part, names in (("attention", ATTENTION), ("ffn", FFN)):
            for name, shape in shapes["runs"][str(i)].get(part, {}).items():
                tensors = tuple(f"model.layers.{b.source_layer}.{names[name]}.weight" for b in run.blocks)
                found.append(TensorMap(("runs", str(i), part, name), shape, tensors, True, name != "norm"))
    found.append(TensorMap(("final_norm",), shapes["final_norm"], ("model.norm.weight",), False, False))
    if num_scores:
        shape = (num_scores, spec.d_model)
        found.append(TensorMap((REWARD_HEAD,), shape, ("score.weight",), False, False))
    elif not spec.tied_embeddings:
        found.append(TensorMap(("head",), shapes["head"], ("lm_head.weight",), False, False))
    return found


def ffn_width(*, ffn_mult: float, d_model: int) -> int:
    """Width of a DeciLM FFN: two thirds of mult x d_model, up to a multiple of 256 (published block_config.py)."""
    width = int(2 * ffn_mult * d_model / 3)
    return -(-width // FFN_MULTIPLE) * FFN_MULTIPLE


def spec_from_hf_config(config: Mapping[str, Any]) -> ModelSpec:
    """Raises WeightsError for an architecture this decoder is not."""
    kind = config.get("model_type")
    if kind not in ("llama", "nemotron-nas"):
        raise WeightsError(f"config.json: model_type={kind!r} is not supported, only `llama` and `nemotron-nas`")
    for key, allowed in (
        ("attention_bias", (False, None)),
        ("mlp_bias", (False, None)),
        ("hidden_act", ("silu", None)),
    ):
        if config.get(key) not in allowed:
            raise WeightsError(f"config.json: {key}={config[key]!r} is not supported, expected {allowed[0]!r}")
    try:
        d_model, heads = config["hidden_size"], config["num_attention_heads"]
        eos = config.get("eos_token_id")
        return ModelSpec(
            vocab_size=config["vocab_size"],
            d_model=d_model,
            num_heads=heads,
            head_dim=config.get("head_dim") or d_model // heads,
            blocks=_blocks(config),
            num_source_layers=config["num_hidden_layers"],
            tied_embeddings=config.get("tie_word_embeddings", False),
            rms_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope(config),
            max_position=config.get("max_position_embeddings", 2048),
            bos_token_id=config.get("bos_token_id"),
            eos_token_ids=tuple(eos) if isinstance(eos, list) else (eos,) if eos is not None else (),
            initializer_range=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise WeightsError(f"config.json: key {error} is missing") from error


def _blocks(config: Mapping[str, Any]) -> tuple[BlockSpec, ...]:
    heads = config["num_attention_heads"]
    if config["model_type"] == "llama":
        attention = AttentionSpec(config.get("num_key_value_heads") or heads)
        ffn = FfnSpec(config["intermediate_size"])
        return tuple(BlockSpec(i, attention, ffn) for i in range(config["num_hidden_layers"]))
    listed = config["block_configs"]
    if len(listed) != config["num_hidden_layers"]:
        raise WeightsError(
            f"config.json: {len(listed)} block_configs, but num_hidden_layers={config['num_hidden_layers']}"
        )
    blocks = []
    for i, entry in enumerate(listed):
        attention, ffn = entry["attention"], entry["ffn"]
        for part in (attention, ffn):
            if part.get("replace_with_linear"):
                raise WeightsError(f"config.json: block {i} has a part replaced with a linear layer; not supported")
        if entry.get("parallel_blocks"):
            raise WeightsError(f"config.json: block {i} has parallel_blocks; not supported")
        block = BlockSpec(
            i,
            None if attention.get("no_op") else AttentionSpec(heads // attention["n_heads_in_group"]),
            None if ffn.get("no_op") else FfnSpec(_width(ffn, d_model=config["hidden_size"])),
        )
        if block.attention or block.ffn:
            blocks.append(block)
    return tuple(blocks)


def _width(ffn: Mapping[str, Any], *, d_model: int) -> int:
    if ffn.get("intermediate_size"):
        return ffn["intermediate_size"]
    return ffn_width(ffn_mult=round(ffn["ffn_mult"], 6), d_model=d_model)


def _rope(config: Mapping[str, Any]) -> RopeSpec:
    """From `rope_theta` and `rope_scaling`, or the newer `rope_parameters`."""
    scaling = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    theta = scaling.get("rope_theta", config.get("rope_theta", 10000.0))
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return RopeSpec(theta=theta)
    if kind != "llama3":
        raise WeightsError(f"config.json: rope type {kind!r} is not supported, only `default` and `llama3`")
    return RopeSpec(
        theta=theta,
        factor=scaling["factor"],
        low_freq_factor=scaling["low_freq_factor"],
        high_freq_factor=scaling["high_freq_factor"],
        original_max_position=scaling["original_max_position_embeddings"],
    )


def hf_config(spec: ModelSpec, *, dtype: str, num_scores: int = 0) -> dict[str, Any]:
    """config.json of a spec: `llama` where all blocks are whole and equal, else `nemotron-nas`. With `num_scores` of a reward
    model over it; raises WeightsError where that is no `llama`."""
    eos = list(spec.eos_token_ids)
    config: dict[str, Any] = {
        "vocab_size": spec.vocab_size,
        "hidden_size": spec.d_model,
        "num_attention_heads": spec.num_heads,
        "head_dim": spec.head_dim,
        "num_hidden_layers": spec.num_source_layers,
        "tie_word_embeddings": spec.tied_embeddings,
        "rms_norm_eps": spec.rms_eps,
        "max_position_embeddings": spec.max_position,
        "bos_token_id": spec.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "initializer_range": spec.initializer_range,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": spec.rope.theta,
        "rope_scaling": _rope_scaling(spec.rope),
        "torch_dtype": dtype,
    }
    whole = len(spec.blocks) == spec.num_source_layers and len(runs(spec)) == 1
    attention, ffn = spec.blocks[0].attention, spec.blocks[0].ffn
    if whole and attention and ffn:
        kind = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
        if num_scores:
            kind |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": num_scores}
        return kind | config | {"num_key_value_heads": attention.num_kv_heads, "intermediate_size": ffn.width}
    if num_scores:
        raise WeightsError(
            "a reward model whose blocks differ has no class in Hugging Face format, only one over a plain Llama; give its "
            "run folder as reward.model.source"
        )
    blocks = {b.source_layer: b for b in spec.blocks}
    config["block_configs"] = [_block_config(blocks.get(i), spec) for i in range(spec.num_source_layers)]
    return {"architectures": ["DeciLMForCausalLM"], "model_type": "nemotron-nas"} | config


def _rope_scaling(rope: RopeSpec) -> dict[str, Any] | None:
    if rope.factor == 1.0:
        return None
    return {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "original_max_position_embeddings": rope.original_max_position,
    }


def _block_config(block: BlockSpec | None, spec: ModelSpec) -> dict[str, Any]:
    attention = block.attention if block else None
    ffn = block.ffn if block else None
    group = spec.num_heads // attention.num_kv_heads if attention else None
    mult = round(ffn.width * 3 / (2 * spec.d_model), 6) if ffn else None
    written: dict[str, Any] = {"no_op": ffn is None, "replace_with_linear": False, "ffn_mult": mult}
    if ffn and mult and ffn_width(ffn_mult=mult, d_model=spec.d_model) != ffn.width:
        written["intermediate_size"] = ffn.width  # no multiple of 256: the factor cannot say it
    return {
        "attention": {"no_op": attention is None, "replace_with_linear": False, "n_heads_in_group": group},
        "ffn": written,
    }
