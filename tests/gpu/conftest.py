"""Runs where an NVIDIA GPU is; elsewhere every test says why it did not: JAX_PLATFORMS=cuda uv run pytest tests/gpu -n 0"""

import os
import subprocess

import pytest

os.environ.setdefault(
    "XLA_PYTHON_CLIENT_PREALLOCATE", "false"
)  # benches and servers need the GPU's memory beside the tests


def num_gpus() -> int:
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return 0
    return len(listed.stdout.strip().splitlines())


def pytest_collection_modifyitems(items):
    found = num_gpus()
    for item in items:
        marker = item.get_closest_marker("gpus")
        if marker and found < marker.args[0]:
            reason = f"needs {marker.args[0]} NVIDIA GPU(s), nvidia-smi lists {found}"
            item.add_marker(pytest.mark.skip(reason=reason))
