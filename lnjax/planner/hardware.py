"""What a GPU and its links give. Rates are those measured with real programs, not the data sheet's.

Sources of the H100 SXM numbers: published measurements of bf16 and FP8 GEMMs (720 and 1,250 TFLOP/s sustained over a model's
shapes), cuDNN attention (500 forward and backward), HBM copies, NCCL all-gather inside a node, InfiniBand at 400 Gb/s a GPU.
Imports no jax.
"""

from dataclasses import dataclass

from lnjax.errors import ConfigError

GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """Rates in FLOP/s and bytes/s of one GPU, unless said otherwise."""

    name: str
    gpus_per_node: int
    memory_bytes: int
    plan_bytes: int
    """A plan may fill so much; the rest is NCCL's, the driver's and fragmentation."""
    peak_flops: float
    """Data sheet, bf16 dense: what MFU is against."""
    bf16_flops: float
    fp8_flops: float
    attention_flops: float
    hbm: float
    nvlink: float
    infiniband: float
    collective_s: float
    """Latency of one small collective inside a node."""
    disk: float
    """Of one node, to the shared file system. Assumed: it differs from cluster to cluster (--disk-gbs)."""
    target: str
    """stream_executor GpuTargetConfigProto in text form: what XLA:GPU compiles for when no GPU is there."""


H100 = Hardware(
    name="h100",
    gpus_per_node=8,
    memory_bytes=84_942_979_072,
    plan_bytes=72 * GIB,
    peak_flops=989e12,
    bf16_flops=720e12,
    fp8_flops=1250e12,
    attention_flops=500e12,
    hbm=3.0e12,
    nvlink=361e9,
    infiniband=44e9,
    collective_s=10e-6,
    disk=5e9,
    target="""
gpu_device_info {
  cuda_compute_capability { major: 9 feature_extension: ACCELERATED_FEATURES }
  threads_per_block_limit: 1024 threads_per_warp: 32 threads_per_core_limit: 2048
  shared_memory_per_block: 49152 shared_memory_per_core: 233472 shared_memory_per_block_optin: 232448
  core_count: 132 fpus_per_core: 128 clock_rate_ghz: 1.98
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000 l2_cache_size: 52428800 device_memory_size: 84942979072
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
""",
)


def hardware(name: str) -> Hardware:
    """Raises ConfigError for a name that is not known."""
    if name != H100.name:
        raise ConfigError(f"--hardware {name!r}: numbers are known for {H100.name!r} only")
    return H100
