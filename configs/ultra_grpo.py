"""Reasoning GRPO on Nemotron-Ultra-253B: the published run, on 72 nodes of 8 H100s.

"report" is arXiv 2505.00949; "aligner" is NeMo-Aligner, branch llama-nemotron-dev, which ran it (defaults of gpt_grpo.yaml);
"chosen" is ours. The report co-located learner (tensor 8, context 2, pipeline 18, data 2) and sampler on all 576 GPUs. 576
divides none of the model's dimensions, so here 64 nodes learn and 8 sample.
"""

from lnjax.models.family import family
from lnjax.schema import (
    AdvantageConfig,
    CheckpointConfig,
    CurriculumConfig,
    EvalConfig,
    GrpoConfig,
    GrpoLossConfig,
    JudgeConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    PackConfig,
    PromptConfig,
    RewardConfig,
    RunConfig,
    SamplingConfig,
    VllmConfig,
)


def config() -> RunConfig:
    return RunConfig(
        name="ultra_grpo",
        # Report 7.4: RL began at an earlier SFT checkpoint than the best; only the final model is public.
        model=ModelConfig(source="checkpoints/Llama-3_1-Nemotron-Ultra-253B-v1", spec=family("ultra253b")),
        mesh=MeshConfig(fsdp=64, tensor=8),  # chosen: 512 GPUs; tensor 8 is the report's and stays in a node
        engine=VllmConfig(
            num_servers=8,  # chosen: one a node; a cluster job starts them there and passes their addresses
            tensor_parallel=8,  # report 5.2
            quantization="fp8",  # report 5.2
            max_len=16_384,  # aligner, commit of 19 March 2025 before the run
            max_sequences=144,  # 1,152 rollouts over 8 servers
            gpu_memory=0.9,  # chosen: nothing shares the GPU (aligner: 0.7, co-located)
            parity_limit=1.1,  # chosen: FP8 samples, BF16 learns
            start_deadline_s=3_600.0,  # chosen: 507 GB of weights for each server
            request_deadline_s=7_200.0,  # chosen: 14,336 tokens at 2 a second
        ),
        reward=RewardConfig(
            num_workers=32,  # chosen
            format="think",  # report 5.1
            judge=JudgeConfig(
                address="http://judge:8000",  # yours: an OpenAI-compatible server of the next
                model="Llama-3.3-70B-Instruct",  # report 5.1
                concurrency=128,  # chosen, as the deadline, the retries and the rule before it
            ),
        ),
        grpo=GrpoConfig(
            prompts=PromptConfig(
                source="data/RL/reasoning/reasoning.jsonl", verifier="judge", max_prompt_tokens=2_048
            ),  # chosen
            # Report 5.1: drop pass rates of 0.75 and above (8 samples of Super each), Gaussian target from easy to hard.
            # Chosen: from 5/8, the easiest left, to 0; one bin of the 8 samples wide; over the whole run.
            curriculum=CurriculumConfig(drop_at=0.75, start=0.625, end=0.0, sigma=0.125, bins=8, batches=500),
            prompts_per_step=72,  # report 5.1
            samples_per_prompt=16,  # report 5.1
            steps=500,  # report, figure 5: about 500
            updates_per_step=2,  # report 5.1: 1,152 rollouts in global batches of 576
            sampling=SamplingConfig(
                temperature=1.0, top_p=1.0, max_new_tokens=14_336
            ),  # report 5.1; the rest of 16,384
            advantage=AdvantageConfig(baseline="leave_one_out", normalize_std=True),  # aligner
            loss=GrpoLossConfig(
                clip_low=0.2,  # aligner, as the next
                clip_high=0.2,
                kl_coef=0.001,  # report 6, GRPO of Ultra's RLHF; not given for reasoning
                aggregation="sequence_mean",  # aligner at micro-batches of one sequence
            ),
            pack=PackConfig(row_tokens=16_384, microbatch_rows=64),  # chosen: one row a shard
            optimizer=OptimizerConfig(
                learning_rate=3e-7,  # report 6, as kl_coef
                warmup_steps=10,  # aligner, as all that follows
                b1=0.9,
                b2=0.98,
                weight_decay=0.1,
                clip_norm=1.0,
            ),
        ),
        eval=EvalConfig(  # report, figure 5: GPQA-Diamond, mean of 4 samples
            prompts=PromptConfig(
                source="data/eval/gpqa_diamond.jsonl", num_prompts=198, verifier="judge", max_prompt_tokens=2_048
            ),
            num_samples=4,
            sampling=SamplingConfig(temperature=0.6, top_p=0.95, max_new_tokens=14_336),  # report 7; length as above
        ),
        checkpoint=CheckpointConfig(every=5, keep=2),  # chosen
    )
