"""Failures a user can act on. Each says what, got, expected and the fix, on one line.

`LnjaxError` is the root; every child also inherits the stdlib error it replaces, so callers may
catch either. The front doors print the message and exit with `exit_code` instead of a traceback.
"""


class LnjaxError(Exception):
    """Root of every error this package raises on purpose."""

    exit_code = 2


class ConfigError(LnjaxError, ValueError):
    """A knob has a value that cannot work (unknown key, wrong type, arithmetic that does not close)."""


class DataError(LnjaxError, ValueError):
    """A dataset row, chat message or prompt is malformed; names the file and line."""


class TemplateError(LnjaxError, ValueError):
    """The tokenizer or its chat template breaks the training contract (mask, stop token, prefix)."""


class CheckpointError(LnjaxError, OSError):
    """A checkpoint is missing, truncated, altered, or does not match the model."""


class WeightsError(LnjaxError, ValueError):
    """A weight file lacks a tensor, or has one of the wrong name, shape or dtype."""


class KernelUnavailable(LnjaxError, RuntimeError):
    """A kernel asked for by name cannot run here; names the failed condition and the override that helps."""


class PlanError(LnjaxError, RuntimeError):
    """A plan does not hold: its program does not compile, or moves data that no layout should need."""


class DeadlineExceeded(LnjaxError, TimeoutError):
    """A wait passed its deadline; says who waited for whom, for what, how long."""


class TrainingDiverged(LnjaxError, ArithmeticError):
    """Too many updates in a row were skipped for a non-finite or spiking gradient."""


class RolloutError(LnjaxError, RuntimeError):
    """The rollout engine returned something the learner must not train on, or cannot serve the request."""


class Stopped(LnjaxError, InterruptedError):
    """The run was asked to stop (SIGTERM, SIGUSR1) and saved its state: the same command goes on from there."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h: try again
