"""python -m lnjax.launch --config NAME [--run-dir DIR] [--dry-run] [--proxy] [--slurm KEY=VALUE ... [--print]]
[--any.key value]

NAME may be a recipe of several runs: [--run-dir DIR] [--dry-run] [--STAGE.any.key value].
"""

import errno
import os
import sys
import traceback

from rich.console import Console

from lnjax import distributed, slurm
from lnjax.alive import Notice, Watchdog
from lnjax.config import Job, config_hash, parse, render
from lnjax.distributed import Place
from lnjax.errors import LnjaxError, Stopped
from lnjax.profile import PROFILING
from lnjax.proxy import ENVIRONMENT
from lnjax.recipe import RecipeJob, parse_recipe, render_recipe


def main(argv: list[str]) -> int:
    """Exit status: 0 done, 2 for what the user can fix, 75 stopped and saved, 76 somebody is stuck, 130 after Ctrl-C."""
    status, why = 0, ""
    place, watchdog, notice = Place(), None, None
    try:
        place, job = distributed.find_place(os.environ), parse_recipe(argv) or parse(argv)
        console = Console(soft_wrap=True, quiet=place.rank > 0)
        if isinstance(job, Job) and job.slurm is not None:
            print(slurm.submit(job, options=slurm.parse_options(job.slurm), print_only=job.print_only))
            return 0
        console.print(_describe(job), highlight=False, markup=False)
        if isinstance(job, Job):
            flags = [os.environ.get("XLA_FLAGS", "")]
            flags += [PROFILING] * bool(job.config.profile) + [ENVIRONMENT["XLA_FLAGS"]] * job.proxy
            os.environ |= {**(ENVIRONMENT if job.proxy else {}), "XLA_FLAGS": " ".join(flags).strip()}
        if not job.dry_run:
            watchdog, notice = Watchdog(place, run_dir=job.run_dir, c=job.config.cluster), Notice(place)
            distributed.keep_programs(job.run_dir)
        distributed.start(place, c=job.config.cluster)
        _work(job, console, watchdog, notice)
        distributed.stop(place)
    except BaseException as error:  # with several processes any end must be told to the others
        status, why = _explain(error)
        if status == 1:
            traceback.print_exc()
        elif not isinstance(error, SystemExit):
            print(why, file=sys.stderr)
        if isinstance(error, Stopped):
            distributed.stop(place)
    finally:
        if notice:
            notice.close()
        if watchdog:
            watchdog.close(status, why)
    return status


def _end(status: int) -> None:
    """Leave the process. A failed one waits for nobody: JAX would wait for the other processes, who wait for this one, and
    Python for the threads of a save that was interrupted as it began, who wait for each other."""
    sys.stdout.flush()
    sys.stderr.flush()
    if status not in (0, Stopped.exit_code):
        os._exit(status)
    sys.exit(status)


def _explain(error: BaseException) -> tuple[int, str]:
    """(exit status, one line); 1 where a traceback says more."""
    line = " ".join(str(error).split())
    if isinstance(error, Stopped):
        return error.exit_code, line
    if isinstance(error, LnjaxError):
        return error.exit_code, f"error: {line}"
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        fix = "free space there and start again: the run resumes from its last checkpoint"
        return LnjaxError.exit_code, f"error: {line}; {fix}"
    if isinstance(error, KeyboardInterrupt):
        return 130, "interrupted; the same command goes on from the last checkpoint"
    if isinstance(error, SystemExit):
        return int(error.code or 0), ""
    return 1, f"{type(error).__name__}: {line}"


def _describe(job: Job | RecipeJob) -> str:
    if isinstance(job, RecipeJob):
        return render_recipe(job)
    return f"{render(job.config)}\nconfig {job.config.name} {config_hash(job.config)} -> {job.run_dir}"


def _work(job: Job | RecipeJob, console: Console, watchdog: Watchdog | None, notice: Notice | None) -> None:
    from lnjax import pipeline, train  # noqa: PLC0415 - jax takes seconds to import; the config is on screen meanwhile

    if isinstance(job, RecipeJob):
        if watchdog is None or notice is None:
            console.print(pipeline.check(job.config, job.run_dir), highlight=False)
            return
        found = pipeline.run(job.config, job.run_dir, watchdog=watchdog, notice=notice)
        console.print("\n".join(found["table"]), highlight=False, markup=False)
        console.print(f"wrote {job.run_dir}/summary.json, table.md, report.html", highlight=False)
        return
    if watchdog is None or notice is None:
        console.print(train.check(job.config, job.run_dir), highlight=False)
        return
    summary = train.run(job.config, job.run_dir, watchdog=watchdog, notice=notice)
    for name, mean in summary["eval"].items():
        low, high = summary["eval_interval"][name]
        console.print(f"held-out after {name:5} {mean:.3f}  (95 % interval {low:.3f} to {high:.3f})", highlight=False)
    console.print(f"wrote {job.run_dir}/summary.json, metrics.jsonl, curve.png, report.html", highlight=False)


if __name__ == "__main__":
    _end(main(sys.argv[1:]))
