"""lnjax's plugin for vLLM. Runs inside vLLM's environment; imports only vllm, torch, tensorstore and numpy."""


def register() -> None:
    """Entry point of the group `vllm.general_plugins`: called once in every process of a server."""
    import torch
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    from vllm.platforms import current_platform
    from vllm.transformers_utils.config import _CONFIG_REGISTRY

    from lnjax_vllm.config import NemotronNasConfig

    if current_platform.is_cpu() and torch.cpu._is_amx_tile_supported() and not torch.cpu._init_amx():
        # vLLM's bfloat16 attention on a CPU uses AMX tiles without asking Linux for them: an illegal instruction.
        raise RuntimeError("this CPU has AMX tiles, and Linux gives this process none; serve float32")
    if "orbax" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("orbax", "lnjax_vllm.engine", "OrbaxEngine")
    _CONFIG_REGISTRY["nemotron-nas"] = NemotronNasConfig
