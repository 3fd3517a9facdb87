"""Supervised fine-tuning of Nemotron-Super-49B on 8 nodes of 8 H100s. "report" is arXiv 2505.00949."""

from lnjax.models.family import family
from lnjax.schema import (
    CheckpointConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PackConfig,
    RunConfig,
    SftConfig,
    SftDataConfig,
)


def config() -> RunConfig:
    return RunConfig(
        name="super49b_sft",
        # The report's start, the distilled model before SFT, is not public; the published model is.
        model=ModelConfig(source="checkpoints/Llama-3_3-Nemotron-Super-49B-v1", spec=family("super49b")),
        mesh=MeshConfig(fsdp=8, tensor=8),  # chosen: parameters, AdamW and gradients take 12.5 of 80 GB a GPU
        sft=SftConfig(
            data=SftDataConfig(source="data/SFT/all.jsonl"),  # report 4.3: the full set
            steps=30_000,  # chosen: 1 epoch (report 4.3) of 33 M rows (table 2) at an assumed 4k tokens a row
            batch_rows=256,  # report 4.3
            pack=PackConfig(row_tokens=16_384, microbatch_rows=8),  # report 4.3: 16k; chosen: one row a shard
            optimizer=OptimizerConfig(
                learning_rate=5e-6,  # report 4.3, constant
                b2=0.98,  # NeMo-Aligner's default, as the next
                weight_decay=0.1,
                spike_factor=10.0,  # chosen
            ),
        ),
        checkpoint=CheckpointConfig(every=250, keep=2),  # chosen
    )
