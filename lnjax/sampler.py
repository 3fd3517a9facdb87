"""A model behind its config's engine and verifiers, without training."""

import argparse
import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lnjax.build import Built, build, build_engine, build_scores, initial_params
from lnjax.config import Job, parse
from lnjax.data.chat import lint_template
from lnjax.data.rows import Row, read_jsonl
from lnjax.distributed import keep_programs
from lnjax.errors import DataError, LnjaxError
from lnjax.metrics import progress
from lnjax.models.fingerprint import fingerprint
from lnjax.rewards.pool import build_reward
from lnjax.schema import RunConfig
from lnjax.score import score_groups
from lnjax.types import Prompt, RolloutEngine, SamplingParams


@dataclass(frozen=True, slots=True)
class Sampler:
    built: Built
    engine: RolloutEngine
    reward: Any
    digest: str
    """Of the weights."""

    def measure(
        self,
        prompts: Sequence[Prompt],
        rows: Sequence[Row],
        *,
        out: Path,
        config: str,
        num_samples: int,
        sampling: SamplingParams,
        seed: int,
        chunk: int,
    ) -> list[Row]:
        """Append to `out` each row with its prompt's pass rate, `chunk` prompts at a time; all lines of `out`.

        The pass rate is the mean accuracy of the samples before the format factor; one that the token budget cut off counts
        as wrong. `config` is a digest of what else it depends on. Prompts that are there already are skipped. Raises
        DataError as `finished_rows` does.
        """
        source = self.built.config.model.source
        measured = {"model": source, "weights": self.digest, "config": config, "samples": num_samples}
        ids = {row["id"] for row in finished_rows(out, measured=measured)}
        todo = [(p, row) for p, row in zip(prompts, rows, strict=True) if p.id not in ids]
        with open(out, "ab") as file, progress(out.stem, total=len(todo), unit="prompts") as advance:
            for start in range(0, len(todo), chunk):
                part = todo[start : start + chunk]
                asked = [p for p, _ in part]
                texts = self.engine.generate(asked, num_samples=num_samples, sampling=sampling, seed=seed)
                for (prompt, row), group in zip(
                    part, score_groups(asked, texts, tokenizer=self.built.tokenizer, reward=self.reward), strict=True
                ):
                    found = {
                        "id": prompt.id,
                        "pass_rate": sum(x.score.parts["accuracy"] for x in group.rollouts) / num_samples,
                        "unfinished": sum(not x.completion.finished for x in group.rollouts) / num_samples,
                        "tokens": sum(sum(x.completion.mask) for x in group.rollouts) / num_samples,
                        "failures": [x.score.failure for x in group.rollouts if x.score.failure],
                    }
                    file.write(json.dumps({**row, **found, "measured": measured}).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
                advance(len(part))
        return finished_rows(out, measured=measured)


@contextmanager
def open_sampler(c: RunConfig, *, folder: Path) -> Iterator[Sampler]:
    """The engine serves the config's model; `folder` takes what servers write. Raises LnjaxError."""
    b = build(c, folder)
    lint_template(b.tokenizer)
    folder.mkdir(parents=True, exist_ok=True)
    with build_reward(c.reward) as reward:
        reward.start()
        engine, _ = build_engine(b, note=print)
        with closing(engine):
            params = initial_params(b, dtype=b.param_dtype)
            engine.load_weights(0, params)
            yield Sampler(b, engine, build_scores(b, reward), fingerprint(params))


def finished_rows(out: Path, *, measured: Mapping[str, Any]) -> list[Row]:
    """The lines of `out`, a half-written last one cut off. Raises DataError for what was measured otherwise, naming it."""
    data = out.read_bytes() if out.exists() else b""
    if not data.endswith(b"\n") and data:
        os.truncate(out, data.rfind(b"\n") + 1)
    if b"\n" not in data:
        return []
    rows = list(read_jsonl(out))
    for where, row in rows:
        before = row.get("measured") or {}
        changed = [f"{k} was {before.get(k)!r}, is {v!r}" for k, v in measured.items() if before.get(k) != v]
        if changed:
            raise DataError(f"{where}: measured otherwise ({'; '.join(changed)}); write elsewhere (--out)")
    return [row for _, row in rows]


def digest_of(*values: Any) -> str:
    """12 hex digits of plain values."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:12]


def front_door(
    work: Callable[[Job, argparse.Namespace], None], argv: Sequence[str], *, doc: str, samples: int, more: Sequence[str]
) -> int:
    """Run `work` with the job, its model replaced by --model, and --out, --samples and `more`. Exit status: 0 done, 2 for what
    the user can fix."""
    if {"-h", "--help"} & set(argv) and "--config" not in argv:
        print(doc)
        return 0
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--samples", type=int, default=samples, choices=range(1, 1025), metavar="N")
    parser.add_argument("--out", type=Path)
    for name in ("--model", *more):
        parser.add_argument(name)
    options, rest = parser.parse_known_args(argv)
    try:
        job = parse(rest)
        if options.model:
            model = replace(job.config.model, source=options.model, spec=None, tokenizer="same")
            job = replace(job, config=replace(job.config, model=model))
        keep_programs(job.run_dir)
        work(job, options)
        return 0
    except LnjaxError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
