"""The encoder-decoder Transformer, GPT, BERT and BART in JAX, as pure functions.

Models can be pre-trained on plain text and fine-tuned; a mask selects the trainable parameters.
Parameters are nested dicts of arrays; a training step is `(state, batch, rng) -> (state, metrics)`.
Public names are imported on first use, so `import transformer_jax` does not import JAX.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach(
    __name__,
    submodules=[
        "cli", "data", "distributed", "errors", "finetuning", "generation", "metrics", "models",
        "nn", "objectives", "planner", "pretrained", "recipes", "report", "sharding", "storage",
        "train", "tree",
    ],
    submod_attrs={
        "finetuning.select": ["trainable_mask"],
        "generation.api": ["fill_mask", "generate"],
        "generation.options": ["generation_options"],
        "models": ["BART", "BERT", "GPT", "Transformer", "build_model", "init_params", "presets"],
        "pretrained.forward": ["forward"],
        "pretrained.load": ["load_pretrained"],
        "pretrained.save": ["save_pretrained"],
        "recipes.finetuning": ["finetune"],
        "recipes.prediction": ["evaluate", "predict"],
        "recipes.pretraining": ["pretrain"],
        "train.step": ["make_train_step"],
    },
)
