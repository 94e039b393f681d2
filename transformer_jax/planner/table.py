"""Plans as people read them: a table, what each sends, the best; and bars to draw."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from transformer_jax.planner.plan import Plan, best_plan


def print_plans(plans: Sequence[Plan], title: str) -> None:
    """The plans as a table, and which is best."""
    table = Table(title=title,
                  caption="GiB of one device; ms of a step, each if nothing else took time")
    for heading in ("setting", "state", "temporary", "total", "has", "FLOPs / model's",
                    "arithmetic", "memory", "network", "sum", "MFU", "tokens a day"):
        table.add_column(heading, justify="left" if heading == "setting" else "right")
    for plan in plans:
        sizes = (plan.state_bytes, plan.temporary_bytes, plan.total_bytes, plan.chip.memory)
        table.add_row(
            str(plan.setting), *(f"{size / 2**30:.2f}" for size in sizes),
            f"{plan.compiled_flops / plan.model_flops:.2f}",
            *(f"{1000 * t:.0f}" for t in (*plan.times.values(), sum(plan.times.values()))),
            f"{plan.mfu:.2f}", f"{plan.tokens_per_day:.3g}", style=None if plan.fits else "red")
    console = Console(width=150)
    console.print(table)
    for plan in plans:
        sent = ", ".join(f"{kind} {n / 2**20:,.0f} MiB" for kind, n in plan.collectives.items())
        console.print(f"{plan.setting}: each device sends {sent or 'nothing'}")
    chosen = best_plan(plans)
    if chosen is None:
        console.print("none of these fits; try more devices, remat full, or fewer rows")
    else:
        console.print(f"best that fits: {chosen.setting}, {chosen.tokens_per_day:.3g} tokens a day")


def memory_bars(plans: Sequence[Plan]) -> dict[str, dict[str, float]]:
    """For `draw.plans`."""
    return {str(plan.setting): {
        "state": plan.state_bytes / 2**30, "temporary": plan.temporary_bytes / 2**30,
        **{name: 1000 * t for name, t in plan.times.items()}} for plan in plans}
