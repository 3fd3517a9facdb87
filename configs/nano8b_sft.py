"""Supervised fine-tuning of Nemotron-Nano-8B, stage 1 of 3, on one node of 8 H100s.

"report" is arXiv 2505.00949. Stage 1 is reasoning-on code, math and science; stages 2 (non-reasoning added) and 3 (a small
blend of chat, instruction following and tools) have no published numbers: run this config again with their data, from the
last run (`--model.source runs/nano8b_sft --sft.data.source FILE --run-dir runs/nano8b_sft2`).
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
        name="nano8b_sft",
        model=ModelConfig(source="checkpoints/Llama-3.1-8B-Instruct", spec=family("nano8b")),  # report 2: the parent
        mesh=MeshConfig(fsdp=8),  # chosen: one node; parameters and AdamW take 12 of 80 GB a GPU
        sft=SftConfig(
            data=SftDataConfig(source="data/SFT/nano_stage1.jsonl"),
            steps=15_000,  # chosen: 4 epochs (report 4.3) of 3.9 M rows (table 2) at an assumed 8k tokens a row
            batch_rows=256,  # report 4.3
            pack=PackConfig(row_tokens=32_768, microbatch_rows=8),  # report 4.3: 32k; chosen: one row a GPU
            optimizer=OptimizerConfig(
                learning_rate=1e-4,  # report 4.3
                schedule="cosine",  # report 4: cosine, linear warm-up of about 10 %
                warmup_steps=1_500,
                min_learning_rate=1e-5,  # chosen: a tenth of the peak, as published for Ultra
                b2=0.98,  # NeMo-Aligner's default, as the next
                weight_decay=0.1,
                spike_factor=10.0,  # chosen: skip what the report saw as gradient explosions
            ),
        ),
        checkpoint=CheckpointConfig(every=250, keep=2),  # chosen
    )
