"""Comparison of plans: a table for the terminal, and data for a bar chart."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from transformer_jax.planner.plan import Plan, best_plan

_COLUMNS = ("config", "state", "temporary", "peak", "available", "FLOPs / model FLOPs", "compute",
            "HBM", "interconnect", "sum", "MFU", "tokens per day")


def print_plans(plans: Sequence[Plan], title: str) -> None:
    """Prints a table of plans, the bytes that each device sends, and the best plan that fits."""
    table = Table(title=title,
                  caption="memory in GiB per device; times in ms per step, limited by each "
                          "resource alone")
    for heading in _COLUMNS:
        table.add_column(heading, justify="left" if heading == "config" else "right")
    for plan in plans:
        sizes = (plan.state_bytes, plan.temporary_bytes, plan.peak_bytes, plan.chip.memory_bytes)
        seconds = plan.roofline_seconds.values()
        table.add_row(
            str(plan.config), *(f"{size / 2**30:.2f}" for size in sizes),
            f"{plan.compiled_flops / plan.model_flops:.2f}",
            *(f"{1000 * t:.0f}" for t in (*seconds, sum(seconds))),
            f"{plan.mfu:.2f}", f"{plan.tokens_per_day:.3g}", style=None if plan.fits else "red")
    console = Console(width=150)
    console.print(table)
    for plan in plans:
        sent = ", ".join(
            f"{kind} {size / 2**20:,.0f} MiB" for kind, size in plan.collective_bytes.items())
        console.print(f"{plan.config}: each device sends {sent or 'nothing'}")
    best = best_plan(plans)
    if best is None:
        console.print("no plan fits into memory; try more devices, remat full, or a smaller "
                      "batch size")
    else:
        console.print(f"best that fits: {best.config}, {best.tokens_per_day:.3g} tokens per day")


def bar_chart_data(plans: Sequence[Plan]) -> dict[str, dict[str, float]]:
    """Memory in GiB and roofline times in ms of each plan, the data of `report.plots.plans`."""
    return {str(plan.config): {
        "state": plan.state_bytes / 2**30, "temporary": plan.temporary_bytes / 2**30,
        **{name: 1000 * t for name, t in plan.roofline_seconds.items()}} for plan in plans}
