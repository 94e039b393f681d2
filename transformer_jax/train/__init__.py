"""Train steps, optimizers, the training loop and checkpoints."""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "anomalies", "callbacks", "checkpoint_files", "checkpointing", "loop", "optimizers", "step",
        "transforms",
    ],
    submod_attrs={
        "callbacks": [
            "Callback", "EarlyStopping", "HistoryFile", "KeepBest", "Logging", "Profiler",
            "Progress", "TensorBoard",
        ],
        "checkpointing": ["Checkpointer"],
        "loop": ["Evaluation", "Run", "fit", "replay_step"],
        "optimizers": ["FinetuningOptions", "make_optimizer", "make_schedule"],
        "step": ["TrainState", "evaluate", "init_state", "make_eval_step", "make_train_step"],
    },
)
