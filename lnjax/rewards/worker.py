"""python -m lnjax.rewards.worker: one JSON request a line in, one verdict a line out. Killed from outside when it hangs."""

import ctypes
import importlib
import json
import os
import resource
import signal
import sys

from lnjax.rewards.verifiers import VERIFIERS, WARM

PR_SET_PDEATHSIG = 1
MEMORY_BYTES = 8 << 30
"""Of one worker's address space: an answer that needs more ends its verdict, not the machine."""


def main(warm: str, extra: str, parent: str) -> None:
    """`warm`: comma-separated verifiers to import first; `extra`: JSON {name: "module:function"}; `parent`: its pid."""
    if sys.platform == "linux":  # a worker stuck in a verifier must not outlive its parent
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != int(parent):
            return
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    out = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what a verifier prints goes to stderr
    verifiers = dict(VERIFIERS)
    for name, where in json.loads(extra).items():
        module, _, function = where.partition(":")
        verifiers[name] = getattr(importlib.import_module(module), function)
    for name in filter(None, warm.split(",")):
        if name in WARM:
            importlib.import_module(WARM[name])
    print(json.dumps({"ready": True}), file=out)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            parts = dict(verifiers[request["verifier"]](request["answer"], request["args"]))
            reply = {"parts": {k: min(1.0, max(0.0, float(v))) for k, v in parts.items()}, "failure": ""}
        except Exception as error:  # any verifier's failure is a verdict of 0 with its reason
            reply = {"parts": {}, "failure": f"raised {type(error).__name__}: {str(error)[:200]}"}
        print(json.dumps(reply), file=out)


if __name__ == "__main__":
    main(*sys.argv[1:])
