"""lnjax's plugin for vLLM. Runs inside vLLM's environment; imports only vllm, torch, tensorstore and numpy."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`: called once in every process of a server."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from lnjax_vllm.config import NemotronNasConfig

    if "orbax" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("orbax", "lnjax_vllm.engine", "OrbaxEngine")
    _CONFIG_REGISTRY["nemotron-nas"] = NemotronNasConfig
