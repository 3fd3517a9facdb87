"""Offline RPO of Nemotron-Nano-8B on one node of 8 H100s. "report" is arXiv 2505.00949, section 6.

Two rounds on the policy's own answers: the first on a mix for reasoning control, the second (this config again, from the last
run, with other data) for instruction following. Which distance and which reward scale were used is not published.
"""

from lnjax.models.family import family
from lnjax.schema import (
    CheckpointConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PackConfig,
    PreferenceConfig,
    PreferenceDataConfig,
    RunConfig,
)


def config() -> RunConfig:
    return RunConfig(
        name="nano8b_rpo",
        model=ModelConfig(source="runs/nano8b_sft/hf", spec=family("nano8b")),
        mesh=MeshConfig(fsdp=8),  # chosen: one node; parameters, AdamW and the reference take 16 of 80 GB a GPU
        preference=PreferenceConfig(
            data=PreferenceDataConfig(source="data/preferences/nano_round1.jsonl"),
            loss="rpo_backward_kl",  # chosen
            beta=0.03,  # report 6: KL weight
            eta=1.0,  # chosen: NeMo-Aligner's default
            steps=400,  # report 6: up to 400
            batch_size=512,  # report 6
            pack=PackConfig(row_tokens=16_384, microbatch_rows=8, max_segments=32),  # chosen: one row a GPU
            optimizer=OptimizerConfig(
                learning_rate=7e-7,  # report 6
                warmup_steps=10,  # NeMo-Aligner's defaults from here on
                b2=0.98,
                weight_decay=0.1,
            ),
        ),
        checkpoint=CheckpointConfig(every=50, keep=2),  # chosen
    )
