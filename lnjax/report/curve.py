"""The learning curve as one picture, from metrics.jsonl alone."""

from pathlib import Path
from typing import Any

import matplotlib as mpl

from lnjax.report.read import Lines, read_run

mpl.use("Agg")
from matplotlib import pyplot as plt

INK, BLUE, ORANGE, GREY = "#222222", "#2a6fbb", "#d9772b", "#9aa3ad"
TITLES = {"init": "untrained", "sft": "after SFT", "grpo": "after GRPO"} | {
    "preference": "after preferences",
    "reward_model": "reward model",
}
CURVES = {
    "sft": ("loss", "SFT: loss (nats per token)", BLUE),
    "preference": ("loss", "Preferences: loss (nats per pair)", ORANGE),
    "grpo": ("reward", "GRPO: mean reward of rollouts", ORANGE),
    "reward_model": ("loss", "Reward model: loss", BLUE),
}
"""What is drawn of each stage: key, title, color."""


def plot_run(run_dir: Path) -> Path:
    """Draw RUN_DIR/curve.png. Raises DataError without metrics."""
    lines = read_run(run_dir).metrics
    stages = [s for s in CURVES if any(x["stage"] == s for x in lines)]
    evals = [x for x in lines if x["stage"] == "eval"]
    panels = len(stages) + bool(evals)
    with plt.rc_context(
        {"axes.spines.top": False, "axes.spines.right": False, "font.size": 10, "axes.edgecolor": GREY}
    ):
        figure, axes = plt.subplots(1, panels, figsize=(4.2 * panels, 3.2), squeeze=False, layout="constrained")
        for axis, stage in zip(axes[0], stages, strict=False):
            rows = [x for x in lines if x["stage"] == stage]
            key, title, color = CURVES[stage]
            _curve(axis, rows, key=key, color=color)
            axis.set(title=title, xlabel="step")
            if key == "loss":
                axis.set_ylim(bottom=0)
        if evals:
            _bars(axes[0][-1], evals)
        target = run_dir / "curve.png"
        figure.savefig(target, dpi=130)
        plt.close(figure)
    return target


def _curve(axis: Any, rows: Lines, *, key: str, color: str) -> None:
    """Values of each step, and their running mean."""
    steps = [x["step"] for x in rows if x.get(key) is not None]
    values = [x[key] for x in rows if x.get(key) is not None]
    axis.plot(steps, values, color=color, alpha=0.3, linewidth=1)
    width = max(1, len(values) // 12)
    mean = [sum(values[max(0, i - width + 1) : i + 1]) / (i + 1 - max(0, i - width + 1)) for i in range(len(values))]
    axis.plot(steps, mean, color=color, linewidth=2)
    axis.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.6)


def _bars(axis: Any, evals: Lines) -> None:
    """Held-out accuracy with its 95 % interval."""
    colors = {"init": GREY, "sft": BLUE, "grpo": ORANGE}
    for place, line in enumerate(evals):
        mean, low, high = line["mean"], line["low"], line["high"]
        color = colors.get(line["after"], INK)
        axis.bar(place, mean, width=0.6, color=color, alpha=0.85)
        axis.errorbar(place, mean, yerr=[[mean - low], [high - mean]], color=INK, capsize=4, linewidth=1.2)
        axis.annotate(f"{mean:.2f}", (place, high), xytext=(0, 4), textcoords="offset points", ha="center", color=INK)
    axis.set_xticks(range(len(evals)), [TITLES.get(x["after"], x["after"]) for x in evals])
    axis.set(title=f"Held-out accuracy ({evals[-1]['num_prompts']} prompts)", ylim=(0, 1.08))
