"""Config class of `nemotron-nas` checkpoints (DeciLM), which transformers does not ship."""

from types import SimpleNamespace
from typing import Any

from vllm.transformers_utils.config import PreTrainedConfig


class NemotronNasConfig(PreTrainedConfig):
    """As published, with `block_configs` as the objects that vLLM's DeciLM reads."""

    model_type = "nemotron-nas"

    def __init__(self, block_configs: list[dict[str, Any]] | None = None, **kwargs: Any):
        self.block_configs = [_block(x) for x in block_configs or []]
        self.max_position_embeddings = kwargs.get("max_position_embeddings", 131072)  # the base class needs it for rope
        super().__init__(**kwargs)

    def to_dict(self) -> dict[str, Any]:
        body = super().to_dict()
        body["block_configs"] = [
            {"attention": vars(x.attention), "ffn": vars(x.ffn)} if isinstance(x, SimpleNamespace) else x
            for x in self.block_configs
        ]
        return body


def _block(entry: Any) -> SimpleNamespace:
    if isinstance(entry, SimpleNamespace):
        return entry
    ffn = dict(entry["ffn"])
    if ffn.get("intermediate_size"):  # exact; where both are there vLLM would round the factor
        ffn.pop("ffn_mult", None)
    return SimpleNamespace(attention=SimpleNamespace(**entry["attention"]), ffn=SimpleNamespace(**ffn))
