"""Verifiers that misbehave, for the reward pool's tests."""

import os
import signal
import time


def hang(answer, args):
    while True:
        time.sleep(0.01)


def throw(answer, args):
    raise KeyError("boo")


def die(answer, args):
    os.kill(os.getpid(), signal.SIGKILL)


def chatty(answer, args):
    print("this goes to stderr and not into the protocol")
    return {"accuracy": 1.0}
