"""Stops a run that is no longer training."""

from collections.abc import Mapping

from lnjax.errors import TrainingDiverged


def check_update(stage: str, step: int, stats: Mapping[str, float], *, max_skipped_in_a_row: int) -> None:
    """Raises TrainingDiverged once too many updates in a row were skipped by the guard."""
    if stats["skipped_in_a_row"] >= max_skipped_in_a_row:
        raise TrainingDiverged(
            f"{stage} step {step}: {stats['skipped_in_a_row']:.0f} updates in a row were skipped for a non-finite or "
            f"spiking gradient (norm {stats['grad_norm']:.3g}, loss {stats['loss']:.3g}); the last checkpoint is whole: "
            "lower the learning rate or raise --*.optimizer.max-skipped-in-a-row"
        )
