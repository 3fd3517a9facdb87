"""Supervised fine-tuning of Nemotron-Ultra-253B on 64 nodes of 8 H100s. "report" is arXiv 2505.00949.

The report saw gradients explode after the first epoch and went on with a new optimizer; here a spike is skipped, and
`--model.source runs/ultra_sft --run-dir runs/ultra_sft2` goes on from the last checkpoint with a new optimizer.
"""

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
        name="ultra_sft",
        # The report's start, the model after continued pretraining, is not public; the published model is.
        model=ModelConfig(source="checkpoints/Llama-3_1-Nemotron-Ultra-253B-v1", spec=family("ultra253b")),
        mesh=MeshConfig(fsdp=64, tensor=8),  # chosen: parameters, AdamW and gradients take 8 of 80 GB a GPU
        sft=SftConfig(
            data=SftDataConfig(source="data/SFT/all.jsonl"),  # report 4.3: the full set
            steps=20_000,  # chosen: 1 epoch of 33 M rows (table 2) at an assumed 4k tokens a row
            batch_rows=256,  # report 4.3
            pack=PackConfig(row_tokens=24_576, microbatch_rows=64),  # report 4.3: 24k; chosen: one row a shard
            optimizer=OptimizerConfig(
                learning_rate=1e-5,  # report 4.3: warm-up over 10 % to 1e-5, cosine to 1e-6
                schedule="cosine",
                min_learning_rate=1e-6,
                warmup_steps=2_000,
                b2=0.98,  # NeMo-Aligner's default, as the next
                weight_decay=0.1,
                spike_factor=10.0,  # chosen: see above
            ),
        ),
        checkpoint=CheckpointConfig(every=100, keep=2),  # chosen
    )
