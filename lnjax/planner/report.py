"""The whole plan as one dict, and as tables."""

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

from rich.console import Console
from rich.table import Table

from lnjax.config import config_hash
from lnjax.errors import ConfigError, PlanError
from lnjax.planner import costs
from lnjax.planner.collectives import summarise, unexpected
from lnjax.planner.compiled import Compiled, Job, Program, run_job
from lnjax.planner.counts import flops_per_token, largest_kernel, num_params
from lnjax.planner.hardware import GIB, Hardware
from lnjax.planner.layout import (
    ITEMSIZE,
    Layout,
    Work,
    apply_layout,
    candidates,
    device_bytes,
    engine_bytes,
    impossible,
    layout_as_written,
    mesh_sizes,
    no_layout,
    work_of,
)
from lnjax.schema import ModelSpec, RunConfig

SHOWN = 6
"""Layouts in the table of alternatives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Scored:
    layout: Layout
    bytes: float
    """Of the fullest learner GPU, in closed form."""
    fits: bool
    seconds: float
    """Of a step."""


def score(c: RunConfig, spec: ModelSpec, layout: Layout, work: Work, hw: Hardware) -> Scored:
    size = device_bytes(c, spec, layout, work)
    seconds = costs.step_seconds(costs.phases(c, spec, layout, work, hw), work)
    return Scored(layout=layout, bytes=size, fits=size <= hw.plan_bytes, seconds=seconds)


def search(c: RunConfig, spec: ModelSpec, work: Work, hw: Hardware, *, gpus: int) -> list[Scored]:
    """Layouts that fit, fastest first; of each mesh the fastest."""
    best: dict[Any, Scored] = {}
    for layout in candidates(c, spec, work, gpus=gpus, hw=hw):
        if device_bytes(c, spec, layout, work) > hw.plan_bytes:
            continue
        found = score(c, spec, layout, work, hw)
        best[layout.mesh] = min(best.get(layout.mesh, found), found, key=_order)
    return sorted(best.values(), key=_order)


def _order(s: Scored) -> tuple[Any, ...]:
    return s.seconds, s.layout.gpus, s.bytes


def make_plan(
    c: RunConfig, spec: ModelSpec, hw: Hardware, *, nodes: int, mean_tokens: int, note: Callable[[str], None]
) -> dict[str, Any]:
    """Choose (or take the config's) layout, compile its learner, add the figures up. `nodes` 0: the config's own GPUs.

    Raises ConfigError for a mesh that cannot be, PlanError for a program that does not compile or moves too much.
    """
    work = work_of(c, mean_tokens=mean_tokens)
    written = layout_as_written(c, stage=work.stage)
    gpus = nodes * hw.gpus_per_node if nodes else written.gpus if written else hw.gpus_per_node
    taken = None if nodes else written
    if taken and (problem := impossible(spec, taken, work)):
        raise ConfigError(f"mesh: {problem}; choose another --mesh.*, or give --nodes and let the planner choose")
    note(f"searching layouts of {gpus} GPUs")
    ranked = search(c, spec, work, hw, gpus=gpus)
    if not taken and not ranked:
        raise no_layout(gpus, spec, hw)
    chosen = score(c, spec, taken, work, hw) if taken else ranked[0]
    laid_out = apply_layout(c, chosen.layout, stage=work.stage)
    several = work.rows > chosen.layout.microbatch_rows
    done = run_job(Job(config=laid_out, stage=work.stage, spec=spec, hw=hw, accumulate=several), note=note)
    check_moves(c, spec, chosen.layout, work, done)
    plan = _figures(c, spec, chosen, work, hw, done)
    plan["explanation"] = explain(spec, gpus, chosen.layout, as_written=bool(taken))
    plan["alternatives"] = [
        {
            "layout": s.layout.text(),
            "rows": s.layout.microbatch_rows,
            "remat": s.layout.remat,
            "bytes": s.bytes,
            "step_seconds": s.seconds,
        }
        for s in ranked[:SHOWN]
    ]
    return plan


def check_moves(c: RunConfig, spec: ModelSpec, layout: Layout, work: Work, done: Compiled) -> None:
    """Raises PlanError naming the operation that moves what no layout should need."""
    m, item = layout.mesh, ITEMSIZE[c.model.compute_dtype]
    kernel = largest_kernel(spec) * item / m.tensor
    tokens = layout.microbatch_rows / (m.data * m.fsdp) * work.row_tokens
    activation = tokens / m.context * spec.d_model * item
    cached = tokens * spec.num_heads * spec.head_dim * item / m.tensor
    limit = 1.01 * max(kernel, activation, cached)
    for program in done.programs:
        problems = unexpected(program.collectives, gather_limit=limit, compute_dtype=c.model.compute_dtype)
        if problems:
            raise PlanError(f"{program.name} program: {'; '.join(problems[:3])}")
    if done.warnings:
        raise PlanError(f"a reshard makes a whole array on every device: {done.warnings[0]}")


def peak_of(program: Program, state: dict[str, int], engine: float) -> float:
    """With what stays on the device beside the program's own arguments."""
    beside = state["reference"] + engine + (state["optimizer"] if program.name == "gradient" else 0)
    return program.peak_bytes + beside


def _figures(c: RunConfig, spec: ModelSpec, chosen: Scored, work: Work, hw: Hardware, done: Compiled) -> dict[str, Any]:
    layout = chosen.layout
    engine = engine_bytes(c, spec, layout, work)
    peak = max(peak_of(p, done.state_bytes, engine) for p in done.programs)
    found = costs.phases(c, spec, layout, work, hw)
    step = costs.step_seconds(found, work)
    update = next(p.seconds for p in found if p.name == "update")
    tokens = work.rows * work.row_tokens * work.updates
    per_token = flops_per_token(spec, context=work.segment_tokens)
    temporaries = "compiled" if done.exact else "modelled"
    plan: dict[str, Any] = {
        "config": c.name,
        "config_hash": config_hash(c),
        "stage": work.stage,
        "hardware": hw.name,
        "parameters": num_params(spec),
        "devices": layout.gpus,
        "learner_devices": layout.learner_gpus,
        "layout": layout.text(),
        "mesh": mesh_sizes(layout.mesh),
        "microbatch_rows": layout.microbatch_rows,
        "remat": layout.remat,
        "fits": peak <= hw.plan_bytes,
        "per_device": {
            **{f"{name}_bytes": size for name, size in done.state_bytes.items()},
            "engine_bytes": engine,
            "temporaries_bytes": max(p.temp_bytes for p in done.programs),
            "peak_bytes": peak,
            "limit_bytes": hw.plan_bytes,
            "closed_form_bytes": chosen.bytes,
        },
        "programs": [
            {**{k: v for k, v in asdict(p).items() if k != "collectives"}, "collectives": summarise(p.collectives)}
            for p in done.programs
        ],
        "flops_per_token": per_token,
        "update_tokens": tokens,
        "mfu": per_token * tokens / (update * layout.learner_gpus * hw.peak_flops),
        "phases": [asdict(p) for p in found],
        "step_seconds": step,
        "sync_seconds": next((p.seconds for p in found if p.name == "publish"), 0.0),
        "checkpoint_bytes": costs.checkpoint_bytes(c, spec, work),
        "gpu_hours": step * work.steps * layout.gpus / 3600,
        "steps": work.steps,
        "compile_rss_bytes": done.rss_bytes,
    }
    if work.stage == "grpo":
        plan["serving"] = costs.serving(c, spec, layout, hw)
        plan["sync_bytes"] = costs.sync_bytes(c, spec)
    exact = [
        "parameters", "devices", "flops_per_token", "sync_bytes", "checkpoint_bytes", "serving.kv_bytes_per_token",
        *(f"per_device.{name}_bytes" for name in done.state_bytes),
    ]  # fmt: skip
    modelled = ["phases", "step_seconds", "sync_seconds", "mfu", "gpu_hours", "serving", "alternatives"]
    plan["how"] = dict.fromkeys(exact, "exact") | dict.fromkeys(modelled, "modelled")
    plan["how"] |= dict.fromkeys(("fits", "per_device.peak_bytes", "per_device.temporaries_bytes"), temporaries)
    plan["how"] |= {"programs": temporaries, "per_device.closed_form_bytes": "modelled"}
    return plan


def explain(spec: ModelSpec, gpus: int, layout: Layout, *, as_written: bool) -> str:
    """Why the learner has the GPUs it has."""
    odd = gpus
    while odd % 2 == 0:
        odd //= 2
    said = [f"The config's own layout: {layout.text()}." if as_written else f"Chosen for {gpus} GPUs: {layout.text()}."]
    if odd > 1 and spec.d_model % odd:
        said.append(
            f"{gpus} = {gpus // odd} x {odd}, and {odd} does not divide the model width {spec.d_model}, so parameters cannot "
            "be sharded over all of them."
        )
        if layout.learner_gpus < gpus:
            said.append(f"{layout.learner_gpus} learn, {gpus - layout.learner_gpus} are left for sampling.")
    idle = gpus - layout.gpus
    if idle:
        said.append(f"{idle} GPUs stay idle.")
    return " ".join(said)


def overrides(c: RunConfig, plan: dict[str, Any]) -> str:
    """The command line that makes a run of this layout."""
    words = [f"--mesh.{axis} {size}" for axis, size in plan["mesh"].items()]
    words += [f"--{plan['stage']}.pack.microbatch-rows {plan['microbatch_rows']}", f"--model.remat {plan['remat']}"]
    return f"python -m lnjax.launch --config {c.name} " + " ".join(words)


def show(c: RunConfig, plan: dict[str, Any], console: Console) -> None:
    """Tables; every figure says how it was got."""
    how, device = plan["how"], plan["per_device"]

    def table(title: str, columns: str, rows: list[tuple[str, ...]]) -> None:
        """The last cell of a row is the key of its figure."""
        shown = Table(*columns.split(","), "", title=title)
        for *cells, key in rows:
            shown.add_row(*cells, f"\\[{how.get(key) or how[key.split('.')[0]]}]")
        console.print(shown)

    where = f"({plan['stage']}) on {plan['devices']} {plan['hardware']}"
    console.print(f"[bold]{plan['config']}[/bold] {where}: {plan['explanation']}")
    rows = [("parameters", f"{plan['parameters']:,}", "parameters")]
    rows += [("FLOPs a token, forward and backward", f"{plan['flops_per_token']:.3g}", "flops_per_token")]
    for name in ("parameters", "optimizer", "gradients", "reference", "temporaries"):
        rows.append((name, f"{device[f'{name}_bytes'] / GIB:.2f} GiB", f"per_device.{name}_bytes"))
    fits = "fits" if plan["fits"] else "[bold red]does not fit[/bold red]"
    peak = f"{device['peak_bytes'] / GIB:.2f} of {device['limit_bytes'] / GIB:.0f} GiB: {fits}"
    rows.append(("peak", peak, "per_device.peak_bytes"))
    if s := plan.get("serving"):
        rows.append(("KV cache a token", f"{s['kv_bytes_per_token']:,} bytes", "serving.kv_bytes_per_token"))
        room = f"{s['cached_tokens']:,.0f} tokens, {s['concurrency']:.0f} sequences at full length"
        rows.append((f"a server of {s['ranks']:.0f} GPUs caches", room, "serving"))
    table("model and memory of a learner GPU", "figure,value", rows)
    rows = [(p["name"], f"{p['seconds']:.2f}", p["bound"], p["note"], "phases") for p in plan["phases"]]
    rows.append(("step", f"{plan['step_seconds']:.1f}", "", f"MFU of the update {plan['mfu']:.1%}", "step_seconds"))
    rows.append(("run", "", "", f"{plan['steps']} steps, {plan['gpu_hours']:,.0f} GPU-hours", "gpu_hours"))
    table("one step", "phase,seconds,bound,note", rows)
    rows = [
        (p["name"], r["kind"], f"{r['group']} {r['axes']}", str(r["count"]), f"{r['bytes'] / 1e9:.2f}", "programs")
        for p in plan["programs"]
        for r in p["collectives"]
        if r["bytes"] > 1e6
    ]
    table("what a learner GPU moves, per microbatch", "program,collective,over,times,GB", rows)
    rows = [
        (a["layout"], str(a["rows"]), a["remat"], f"{a['bytes'] / GIB:.0f}", f"{a['step_seconds']:.1f}", "alternatives")
        for a in plan["alternatives"]
    ]
    table("fastest layouts of as many GPUs that fit", "layout,rows,remat,GiB,step s", rows)
    if how["per_device.temporaries_bytes"] == "modelled":
        console.print(
            "jax's CUDA plugin is not installed: compiled for virtual CPU devices, so temporaries are only modelled; "
            "with the extra cuda13 they are the GPU's own"
        )
    console.print(overrides(c, plan), highlight=False)


def with_disk(hw: Hardware, gigabytes_per_s: float) -> Hardware:
    if gigabytes_per_s <= 0:
        raise ConfigError(f"--disk-gbs {gigabytes_per_s:g} must be positive")
    return replace(hw, disk=gigabytes_per_s * 1e9)
