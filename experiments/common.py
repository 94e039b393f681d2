"""Aliases of `transformer_jax.recipes.run_dir`, until no script imports them from here."""

from transformer_jax.recipes.run_dir import setup as start
from transformer_jax.recipes.run_dir import write_results

__all__ = ["start", "write_results"]
