"""python -m lnjax.report RUN_DIR [RUN_DIR ...] [--out FILE.html] [--parent RUN_DIR]: one page to look at, opened from disk."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lnjax.errors import LnjaxError
from lnjax.report.page import write_page


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m lnjax.report", description="One HTML page about runs.")
    parser.add_argument("run_dirs", metavar="RUN_DIR", nargs="+", type=Path, help="their curves share the charts")
    parser.add_argument("--out", type=Path, metavar="FILE.html", help="default: report.html in the first RUN_DIR")
    parser.add_argument("--parent", type=Path, metavar="RUN_DIR", help="a run to compare the configs with")
    given = parser.parse_args(argv)
    out = given.out or given.run_dirs[0] / "report.html"
    try:
        write_page(given.run_dirs, out=out, parent=given.parent)
    except (LnjaxError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return LnjaxError.exit_code
    print(f"{out}  {out.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
