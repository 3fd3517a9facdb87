"""vLLM's weight-transfer backend `orbax`: stage everything, check everything, then apply.

`update_weights` reads and validates beside the live model; only `finish_weight_update` touches it. So a version that is
damaged, foreign or uncommitted leaves the old weights serving.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import WeightTransferEngine, WeightTransferInitInfo, WeightTransferUpdateInfo
from vllm.logger import init_logger
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from lnjax_vllm.reader import Refused, check, opened, read
from lnjax_vllm.slices import Slice, slices_of

logger = init_logger("vllm.lnjax")
ROOT = "LNJAX_PUBLISH_ROOT"
"""Environment variable: the one folder that versions may come from."""


@dataclass
class InitInfo(WeightTransferInitInfo):
    """Nothing to agree on: the root was given at the server's start."""


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """A published version."""

    number: int
    digest: str
    path: str


class OrbaxEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One per worker process, so one per tensor-parallel rank."""

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo
    supports_draft_weight_update = False

    def __init__(self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module) -> None:
        super().__init__(config, vllm_config, device, model)
        if self.parallel_config.pipeline_parallel_size > 1:
            raise ValueError("weight transfer `orbax` serves tensor parallelism; pipeline_parallel_size must be 1")
        self._slices = slices_of(model)
        self._staged: tuple[UpdateInfo, dict[str, torch.Tensor], dict[str, Any]] | None = None
        self.attestation: dict[str, Any] = {}
        """What this rank serves; empty before the first version and after a failed one."""

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        if ROOT not in os.environ:
            raise ValueError(f"{ROOT} is not set; start the server with the folder that versions are published to")

    def start_weight_update(self) -> None:
        self._staged = None

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """The base class's waits for an accelerator, which a CPU has not; nothing here is asynchronous."""
        self.receive_weights(self.parse_update_info(update_info))

    def receive_weights(self, update_info: UpdateInfo) -> None:
        start, root = time.monotonic(), Path(os.environ[ROOT]).resolve()
        with opened(update_info.path, root=root, number=update_info.number, digest=update_info.digest) as (
            folder,
            manifest,
        ):
            check(manifest, self._slices)
            tensors, count = read(folder, manifest, self._slices)
        local = sum(t.element_size() * _numel(self._slices[name]) for name, t in tensors.items())
        facts = {"bytes_read": count, "bytes_needed": local, "stage_seconds": time.monotonic() - start}
        self._staged = (update_info, tensors, facts)

    def finish_weight_update(self) -> None:
        if self._staged is None:
            raise Refused("finish_weight_update without a staged version; call update_weights first")
        (update, tensors, facts), self._staged = self._staged, None
        start, self.attestation = time.monotonic(), {}
        initialize_layerwise_reload(self.model)
        try:
            self.model.load_weights(iter(tensors.items()))
        finally:
            finalize_layerwise_reload(self.model, self.model_config)
        self._refresh_tied_head()
        served = self._read_back(tensors)
        self.attestation = {
            "number": update.number,
            "digest": update.digest,
            "rank": self.parallel_config.rank,
            **facts,
            **served,
            "apply_seconds": time.monotonic() - start,
        }
        logger.info("lnjax: serving version %s (%s…)", update.number, update.digest[:16])

    def _refresh_tied_head(self) -> None:
        """A head tied to the embeddings is not reloaded; on a CPU it would go on with a packed copy of the old weights."""
        head = getattr(self.model, "lm_head", None)
        if getattr(self.model.config, "tie_word_embeddings", False) and head is not None:
            head.quant_method.process_weights_after_loading(head)

    def _read_back(self, tensors: dict[str, torch.Tensor]) -> dict[str, Any]:
        """How many tensors are served, bit for bit, as the version has them; how many cannot be read back.

        What was staged has the version's SHA-256, so a live tensor that equals it has too. Packed (CPU) and quantised
        (FP8) layers cannot be compared: of them only the staged bytes are attested.
        """
        served, staged = 0, 0
        for name, item in self._slices.items():
            live = item.served()
            if live is None:
                staged += 1
                continue
            served += 1
            expected = tensors[name].narrow(item.axis, item.start, item.size).to(device=live.device)
            if live.dtype != expected.dtype or not torch.equal(live, expected):
                raise RuntimeError(f"tensor {name}: the served weights are not the staged ones")
        return {"read_back": served, "staged_only": staged}

    def shutdown(self) -> None:
        self._staged = None


def _numel(item: Slice) -> int:
    count = 1
    for size in item.local_shape:
        count *= size
    return count
