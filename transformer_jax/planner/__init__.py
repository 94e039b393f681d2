"""Ahead-of-time plans: memory, collectives and roofline of a training step on target hardware."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "chips", "hlo", "plan", "plan_config",
    ],
    submod_attrs={
        "plan": ["Plan", "best_plan", "compile_plan"],
        "plan_config": ["PlanConfig", "enumerate_configs"],
    },
)
