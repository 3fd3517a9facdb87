"""Every test sees eight virtual CPU devices; a mesh may use one of them or all. With JAX_PLATFORMS=cuda: the GPUs."""

import atexit
import os
import shutil
import tempfile

if os.environ.setdefault("JAX_PLATFORMS", "cpu") == "cpu":
    os.environ["XLA_FLAGS"] = (
        os.environ.get("XLA_FLAGS", "")
        + " "
        + " ".join(
            (
                "--xla_force_host_platform_device_count=8",
                "--xla_backend_optimization_level=0",  # tests wait for compiling, not for running
                "--xla_llvm_disable_expensive_passes=true",
            )
        )
    )

import jax
import pytest

from lnjax.models import decoder

PROGRAMS = "JAX_COMPILATION_CACHE_DIR"
if PROGRAMS not in os.environ:  # what one started process compiled, the others load, whichever worker's they are
    os.environ[PROGRAMS] = tempfile.mkdtemp(prefix="lnjax-programs-")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
    atexit.register(shutil.rmtree, os.environ[PROGRAMS], ignore_errors=True)

jax.config.update("jax_compilation_cache_dir", None)  # tests ask programs in this process what they are made of
jax.config.update("jax_numpy_rank_promotion", "raise")
decoder.UNROLL["cpu"] = 1  # unrolled layers take longer to compile than tests take to run them


@pytest.fixture(scope="session")
def make_model():
    """model(spec, mesh config, number of devices, ...) in float32."""
    import jax.numpy as jnp

    from lnjax.mesh import make_mesh
    from lnjax.models.decoder import Compute, Model
    from lnjax.ops.select import select_ops
    from lnjax.schema import MeshConfig, OpsConfig

    def make(spec, *, mesh=None, devices=1, remat="none", dtype="float32"):
        c = mesh or MeshConfig()
        grid = make_mesh(c, devices=jax.devices()[:devices])
        return Model(spec, Compute(select_ops(OpsConfig(), mesh=grid), jnp.dtype(dtype), remat))

    return make
