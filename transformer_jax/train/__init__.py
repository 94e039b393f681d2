"""Train steps, optimizers, the training loop and checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "anomalies", "callbacks", "checkpoint_files", "checkpointer", "checkpointing",
        "compiled_step", "loop", "optimizers", "preemption", "run", "step", "transforms",
    ],
    submod_attrs={
        "callbacks": [
            "EarlyStopping", "HistoryFile", "KeepBest", "Logging", "Profiler", "Progress",
            "TensorBoard",
        ],
        "checkpointer": ["Checkpointer"],
        "loop": ["Evaluation", "fit", "replay_step"],
        "optimizers": ["FinetuningOptions", "make_optimizer", "make_schedule"],
        "run": ["Callback", "Run"],
        "step": ["TrainState", "evaluate", "init_state", "make_eval_step", "make_train_step"],
    },
)
