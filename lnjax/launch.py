"""python -m lnjax.launch --config NAME [--run-dir DIR] [--dry-run] [--proxy] [--any.key value]"""

import errno
import os
import sys

from rich.console import Console

from lnjax.config import config_hash, parse, render
from lnjax.errors import LnjaxError
from lnjax.proxy import ENVIRONMENT


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 for what the user can fix, 130 after Ctrl-C."""
    try:
        job = parse(argv)
        console = Console(soft_wrap=True)
        console.print(render(job.config), highlight=False, markup=False)
        console.print(f"config {job.config.name} {config_hash(job.config)} -> {job.run_dir}", highlight=False)
        if job.proxy:
            flags = f"{os.environ.get('XLA_FLAGS', '')} {ENVIRONMENT['XLA_FLAGS']}"
            os.environ |= {**ENVIRONMENT, "XLA_FLAGS": flags.strip()}
        from lnjax import train  # noqa: PLC0415 - jax takes seconds to import; the config is on screen meanwhile

        if job.dry_run:
            console.print(train.check(job.config, job.run_dir), highlight=False)
            return 0
        summary = train.run(job.config, job.run_dir)
        for name, mean in summary["eval"].items():
            low, high = summary["eval_interval"][name]
            console.print(
                f"held-out after {name:5} {mean:.3f}  (95 % interval {low:.3f} to {high:.3f})", highlight=False
            )
        console.print(f"wrote {job.run_dir}/summary.json, metrics.jsonl, curve.png", highlight=False)
        return 0
    except LnjaxError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        print(
            f"error: {error}; free space there and start again: the run resumes from its last checkpoint",
            file=sys.stderr,
        )
        return LnjaxError.exit_code
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
