"""The PyTorch path, in its own process and environment: python theirs.py CASE ARM FOLDER SETTINGS. Imports nothing of lnjax.

`default` is what Hugging Face gives: Llama with SDPA, eager, padded batches, AdamW, `generate`, TRL's GRPOTrainer.
`steelman` is what an expert makes of it: torch.compile, packed rows, logits of trained tokens only and in chunks, fused AdamW,
the best SDPA backend, a static cache. `vllm` samples with vLLM.
Reads {"item": name, "k": step} a line, writes {"seconds": s, ...} a line; the first line it writes is {"first": ..., ...}.
"""

import contextlib
import functools
import json
import os
import sys
import threading
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

CHUNK = 1024
"""Tokens whose logits are there at once (steelman)."""


class Work:
    """What the parent wrote for this case."""

    def __init__(self, arm, folder, settings):
        self.arm, self.folder, self.s = arm, Path(folder), settings
        self.cuda = torch.cuda.is_available()
        self.device = "cuda" if self.cuda else "cpu"
        self.dtype = getattr(torch, settings["dtype"])
        self.arrays = dict(np.load(self.folder / "work.npz")) if (self.folder / "work.npz").exists() else {}

    def model(self, *, dtype=None, **kwargs):
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(
            self.folder / "weights", dtype=dtype or self.dtype, attn_implementation="sdpa", **kwargs
        )
        return model.to(self.device)

    def put(self, x):
        return torch.as_tensor(np.ascontiguousarray(x)).to(self.device)

    def autocast(self):
        """As HF Trainer with bf16=True: float32 weights, bfloat16 products."""
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def backend(self):
        if self.arm == "steelman" and self.cuda:
            return sdpa_kernel([SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION], set_priority=True)
        return contextlib.nullcontext()


def conversation(w, i):
    found, j = [], 0
    while f"ids_{i}_{j}" in w.arrays:
        found.append((w.arrays[f"ids_{i}_{j}"], w.arrays[f"mask_{i}_{j}"]))
        j += 1
    return found


def padded(w, i):
    """Batch i as HF's collator makes it: microbatches padded to their longest."""
    found, rows = conversation(w, i), w.s["padded_rows"]
    for at in range(0, len(found), rows):
        part = found[at : at + rows]
        width = max(len(ids) for ids, _ in part)
        ids, labels, mask = (np.full((len(part), width), fill, np.int64) for fill in (0, -100, 0))
        for row, (tokens, trained) in enumerate(part):
            ids[row, : len(tokens)], mask[row, : len(tokens)] = tokens, 1
            labels[row, : len(tokens)] = np.where(trained > 0, tokens, -100)
        yield {"input_ids": w.put(ids), "labels": w.put(labels), "attention_mask": w.put(mask)}


def rows_of(w, i):
    """Batch i packed as ours: microbatches of rows, a mask that keeps documents apart, where the loss is."""
    names = ("tokens_BT", "positions_BT", "segment_ids_BT", "loss_mask_BT")
    tokens, positions, segments, mask = (w.arrays[f"{name}_{i}"] for name in names)
    dense = bool((segments == 1).all())
    step, size = w.s["microbatch_rows"], tokens.shape[1]
    causal = np.tril(np.ones((size, size), bool))
    most = max(int((w.arrays[f"loss_mask_BT_{b}"][at : at + step] > 0).sum()) for b in range(w.s["num_batches"])
               for at in range(0, len(w.arrays[f"loss_mask_BT_{b}"]), step))  # fmt: skip
    most = -(-most // 128) * 128  # one static shape
    for at in range(0, len(tokens), step):
        cut = slice(at, at + step)
        seen = None
        if not dense:
            same = segments[cut, :, None] == segments[cut, None, :]
            seen = w.put((same & causal & (segments[cut, :, None] > 0) | np.eye(size, dtype=bool))[:, None])
        row, column = np.nonzero(mask[cut] > 0)
        where, targets = np.zeros(most, np.int64), np.full(most, -100, np.int64)
        where[: len(row)], targets[: len(row)] = row * size + column - 1, tokens[cut][row, column]
        yield (
            w.put(tokens[cut].astype(np.int64)),
            w.put(positions[cut].astype(np.int64)),
            seen,
            w.put(where),
            w.put(targets),
        )


def sum_of_losses(hidden, weight, targets):
    """Cross-entropy of chunks of tokens; the backward pass makes each chunk's logits again."""

    def one(h, t):
        return F.cross_entropy((h @ weight.to(h.dtype).T).float(), t, ignore_index=-100, reduction="sum")

    total = 0.0
    for at in range(0, len(targets), CHUNK):
        total = total + checkpoint(one, hidden[at : at + CHUNK], targets[at : at + CHUNK], use_reentrant=False)
    return total


def train(w):
    model = w.model(dtype=torch.float32)
    model.train()
    model.config.use_cache = False
    steel = w.arm == "steelman"
    optimizer = torch.optim.AdamW(model.parameters(), lr=w.s["rate"], weight_decay=0.0, fused=steel)
    count = w.s["num_batches"]
    batches = [list(rows_of(w, i) if steel else padded(w, i)) for i in range(count)]
    totals = [sum(int(m.sum()) for _, m in conversation(w, i)) for i in range(count)]
    if w.s["remat"] == "full" or (w.cuda and not steel):
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def packed_loss(tokens, positions, seen, where, targets):
        hidden = model.model(input_ids=tokens, position_ids=positions, attention_mask=seen).last_hidden_state
        return sum_of_losses(hidden.reshape(-1, hidden.shape[-1])[where], model.lm_head.weight, targets)

    run = torch.compile(packed_loss, fullgraph=not w.cuda)

    def loss_of(batch, total):
        return run(*batch) / total if steel else model(**batch, num_items_in_batch=total).loss

    def update(k):
        total = 0.0
        for batch in batches[k % count]:
            with w.autocast(), w.backend():
                loss = loss_of(batch, totals[k % count])
            loss.backward()
            total += float(loss.detach())
        norm = float(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total, norm

    loss, norm = update(0)
    return {"loss": loss, "grad_norm": norm}, {"step": update}


@torch.no_grad()
def logprob(w):
    model = w.model().eval()
    tokens, step = w.put(w.arrays["tokens"].astype(np.int64)), w.s["microbatch_rows"]

    def default(part):
        logits = model(input_ids=part).logits[:, :-1].float()
        return torch.log_softmax(logits, -1).gather(-1, part[:, 1:, None])[..., 0]

    def chunked(part):
        hidden = model.model(input_ids=part).last_hidden_state[:, :-1].flatten(0, 1)
        found = [
            -F.cross_entropy((h @ model.lm_head.weight.T).float(), t, reduction="none")
            for h, t in zip(hidden.split(CHUNK), part[:, 1:].flatten().split(CHUNK), strict=True)
        ]
        return torch.cat(found)

    run = torch.compile(chunked) if w.arm == "steelman" else default

    @torch.no_grad()
    def score(k):
        with w.backend():
            return [run(part) for part in tokens.split(step)]

    mean = float(np.mean([float(x.sum()) / part.numel() for x, part in zip(score(0), tokens.split(step), strict=True)]))
    return {"loss": -mean}, {"pass": score}


def decode(w):
    model, prompts = w.model().eval(), w.put(w.arrays["prompts"])
    model.generation_config.eos_token_id = None
    static = {"cache_implementation": "static"} if w.arm == "steelman" else {}

    @torch.no_grad()
    def generate(ids, new, **kwargs):
        ones = torch.ones_like(ids)
        out = model.generate(
            ids,
            attention_mask=ones,
            max_new_tokens=new,
            min_new_tokens=new,
            pad_token_id=0,
            top_k=0,
            top_p=1.0,
            **kwargs,
        )
        return out[:, ids.shape[1] :]

    greedy = generate(prompts, w.s["greedy"], do_sample=False)
    rows = prompts.repeat_interleave(w.s["samples"], 0)
    batch = lambda k: generate(rows, w.s["new_tokens"], do_sample=True, temperature=1.0, **static)  # noqa: E731
    alone = lambda k: generate(rows[:1], w.s["new_tokens"], do_sample=True, temperature=1.0, **static)  # noqa: E731
    return {"tokens": greedy.tolist()}, {f"batch {len(rows)}": batch, "batch 1": alone}


def served(w):
    """(vLLM in this process, the prompts, a function that samples, one that makes their greedy tokens)."""
    environment = {"ENABLE_V1_MULTIPROCESSING": "0", "CPU_KVCACHE_SPACE": "2", "LOGGING_LEVEL": "WARNING"}
    os.environ |= {f"VLLM_{name}": value for name, value in environment.items()}
    from vllm import LLM, SamplingParams

    length = w.s["prompt_tokens"] + w.s["new_tokens"]
    llm = LLM(str(w.folder / "weights"), skip_tokenizer_init=True, dtype=w.s["dtype"], max_model_len=length, seed=0)
    prompts = [{"prompt_token_ids": row.tolist()} for row in w.arrays["prompts"]]

    def generate(asked, new, *, n, temperature):
        c = SamplingParams(n=n, temperature=temperature, max_tokens=new, ignore_eos=True, detokenize=False, logprobs=0)
        return [[o.token_ids for o in x.outputs] for x in llm.generate(asked, c, use_tqdm=False)]

    greedy = lambda: [list(group[0]) for group in generate(prompts, w.s["greedy"], n=1, temperature=0.0)]  # noqa: E731
    return llm, prompts, generate, greedy


def decode_vllm(w):
    _, prompts, generate, greedy = served(w)
    batch = lambda k: generate(prompts, w.s["new_tokens"], n=w.s["samples"], temperature=1.0)  # noqa: E731
    alone = lambda k: generate(prompts[:1], w.s["new_tokens"], n=1, temperature=1.0)  # noqa: E731
    return {"tokens": greedy()}, {f"batch {len(prompts) * w.s['samples']}": batch, "batch 1": alone}


def sync(w):
    """A new policy into vLLM in this process: by a Hugging Face folder, or (steelman) handed over in memory, unchecked."""
    llm, *_, greedy = served(w)
    model, folder = w.model(), w.folder / f"policy-{w.arm}"

    @torch.no_grad()
    def policy(k):
        new = {name: x * (1 + 1e-3 * k) for name, x in model.named_parameters()}
        if w.arm == "steelman":
            found = {"weights_iterator": iter(new.items())}
        else:
            model.save_pretrained(folder, state_dict=new)
            found = {"weights_path": str(folder)}
        llm.collective_rpc("reload_weights", kwargs=found)
        llm.reset_prefix_cache()

    policy(0)
    return {"tokens": greedy()}, {"policy": policy}


def reinforce(w):
    """TRL's GRPOTrainer, its step begun when the parent asks for it."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    s = w.s
    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(s["vocab_size"])}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="t0", eos_token="t1", unk_token="t0")
    model = w.model(dtype=torch.float32)
    greedy = decode_greedy(w, model)
    go, done = threading.Semaphore(0), threading.Semaphore(0)

    class Paced(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            done.release()
            go.acquire()

    def reward(completion_ids, **kwargs):
        return [sum(t % 2 == 0 for t in ids) / len(ids) for ids in completion_ids]

    config = GRPOConfig(
        output_dir=str(w.folder / "trl"), per_device_train_batch_size=s["prompts"] * s["samples"], use_cpu=not w.cuda,
        num_generations=s["samples"], max_completion_length=s["new_tokens"], learning_rate=s["rate"],
        lr_scheduler_type="constant", max_steps=10**6, save_strategy="no", report_to=[], logging_steps=10**6, beta=0.0,
        adam_beta2=0.999, max_grad_norm=1.0, bf16=w.dtype == torch.bfloat16, gradient_checkpointing=False,
        temperature=1.0, top_p=1.0, top_k=0, disable_tqdm=True, mask_truncated_completions=False, dataloader_num_workers=0,
        generation_kwargs={"min_new_tokens": s["new_tokens"], "eos_token_id": None}, shuffle_dataset=False,
    )  # fmt: skip
    rows = [{"prompt": " ".join(f"t{t}" for t in ids)} for ids in w.arrays["prompts"].tolist()]
    trainer = GRPOTrainer(
        model=model, reward_funcs=reward, args=config, train_dataset=Dataset.from_list(rows * 64),
        processing_class=tokenizer, callbacks=[Paced()],
    )  # fmt: skip
    threading.Thread(target=trainer.train, daemon=True).start()
    done.acquire()

    def iteration(k):
        go.release()
        done.acquire()

    return {"tokens": greedy}, {"iteration": iteration}


def decode_greedy(w, model):
    model.generation_config.eos_token_id = None
    ids, new = w.put(w.arrays["prompts"]), w.s["greedy"]
    with torch.no_grad():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            pad_token_id=0,
        )
    return out[:, ids.shape[1] :].tolist()


def kernels(w):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

    s, steel = w.s, w.arm == "steelman"
    rows, size, d, vocab = s["microbatch_rows"], s["row_tokens"], s["d_model"], s["vocab_size"]
    made = functools.partial(torch.randn, device=w.device, dtype=w.dtype)
    config = LlamaConfig(
        hidden_size=d, intermediate_size=s["ffn"], num_attention_heads=s["num_heads"], num_key_value_heads=s["num_kv_heads"],
        head_dim=s["head_dim"], vocab_size=vocab, max_position_embeddings=size, attn_implementation="sdpa",
    )  # fmt: skip
    block = LlamaDecoderLayer(config, 0).to(w.device, w.dtype)
    positions = torch.arange(size, device=w.device)[None]
    x, table = made(rows, size, d).requires_grad_(), (0.02 * made(vocab, d)).requires_grad_()
    turned = LlamaRotaryEmbedding(config).to(w.device)(x, positions)
    ids = torch.randint(vocab, (size,), device=w.device)
    q, k, v = (made(rows, n, size, s["head_dim"]).requires_grad_() for n in (s["num_heads"], *[s["num_kv_heads"]] * 2))
    compiled = torch.compile if steel else (lambda f: f)

    def attention(q, k, v):
        with w.backend():
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    @compiled
    def layer(x):
        out = block(x, position_embeddings=turned, position_ids=positions, attention_mask=None)
        return (out[0] if isinstance(out, tuple) else out).float().mean()

    @compiled
    def head(x, table):
        if steel:
            return sum_of_losses(x[0], table, ids) / size
        return F.cross_entropy((x[0] @ table.T).float(), ids)

    def both(f, *args):
        with w.backend():
            f(*args).float().sum().backward()
        for a in (*args, *block.parameters()):
            a.grad = None

    product = torch.no_grad()(lambda k_: x.reshape(-1, d) @ block.mlp.gate_proj.weight.T)
    return {}, {
        "matmul": product,
        "attention": torch.no_grad()(lambda k_: attention(q, k, v)),
        "attention both": lambda k_: both(attention, q, k, v),
        "head both": lambda k_: both(head, x, table),
        "layer both": lambda k_: both(layer, x),
    }


CASES = {"sft": train, "sft-dense": train, "logprob": logprob, "decode": decode, "grpo": reinforce}
CASES |= {"ops": kernels, "sync": sync}


def main():
    case, arm, folder, settings = sys.argv[1:]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries print

    def say(**values):
        answers.write(json.dumps(values) + "\n")
        answers.flush()

    w = Work(arm, folder, json.loads(settings))
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("highest")
    first, items = (decode_vllm if arm == "vllm" else CASES[case])(w)
    say(first=first, torch=torch.__version__)
    for line in sys.stdin:
        asked = json.loads(line)
        start = time.perf_counter()
        items[asked["item"]](asked["k"])
        if w.cuda:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if w.cuda else 0
        say(seconds=time.perf_counter() - start, peak_bytes=peak)


if __name__ == "__main__":
    main()
