"""Adds a method to vLLM's workers (`--worker-extension-cls`), which /collective_rpc calls on every rank."""

from typing import Any


class Attest:
    """Mixed into the worker class."""

    def lnjax_attest(self) -> dict[str, Any]:
        """Number, digest and read-back of the version this rank serves; empty where there is none."""
        return dict(self.weight_transfer_engine.attestation)
