"""End-to-end jobs: pre-training, fine-tuning, sequence-to-sequence training and sweeps.

Each job consists of a frozen dataclass of settings and a function that takes it as its argument.
`finetune` also accepts the settings as keyword arguments.
"""

import lazy_loader

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "config", "encoding", "finetuning", "finetuning_run", "prediction", "pretraining",
        "quickstart", "retention", "run_dir", "sequence_to_sequence", "sweep", "task_encoder",
    ],
    submod_attrs={
        "config": ["DatasetConfig", "FinetuneOptimizerConfig", "MeshConfig", "OptimizerConfig",
                   "TrainingConfig"],
        "finetuning": ["FinetuneConfig", "FinetuneResult", "finetune", "finetune_config"],
        "prediction": ["evaluate", "predict"],
        "pretraining": ["PretrainConfig", "pretrain", "pretrain_config"],
        "quickstart": ["QuickstartConfig"],
        "sequence_to_sequence": ["DenoiseConfig", "TranslateConfig", "denoise",
                                 "train_translation"],
        "sweep": ["SweepConfig"],
    },
)
