"""Train steps, optimizers, the training loop and checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "anomalies", "checkpoint_dirs", "checkpoint_items", "checkpointing", "compiled_step",
        "lock", "loop", "optimizers", "preemption", "profiling", "progress", "step", "step_timer",
        "transforms",
    ],
    submod_attrs={
        "loop": ["fit"],
        "optimizers": ["make_optimizer", "make_schedule"],
        "step": ["TrainState", "evaluate", "init_state", "make_eval_step", "make_train_step"],
    },
)
