"""Public names and rooms are imported when they are used, and nothing before."""

import importlib
import json
import pkgutil
import subprocess
import sys

import pytest

import transformer_jax

OPTIONAL = ("tensorflow_datasets", "orbax", "matplotlib", "pyarrow", "tokenizers")
NOT_USED = ("torch", "tensorflow", "datasets")
PACKAGES = ["transformer_jax", *sorted(
    module.name for module in pkgutil.walk_packages(transformer_jax.__path__, "transformer_jax.")
    if module.ispkg)]


def modules_after(statement: str) -> set[str]:
    """Runs a statement in a new interpreter; returns the names of the modules that are loaded."""
    script = f"import json, sys\n{statement}\nprint(json.dumps(list(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True,
                            text=True)
    return set(json.loads(result.stdout.splitlines()[-1]))


def test_package_imports_neither_jax_nor_numpy():
    loaded = modules_after("import transformer_jax; dir(transformer_jax)")
    assert not {"jax", "numpy", "flax"} & loaded


@pytest.mark.slow
def test_models_and_steps_need_no_data_libraries():
    loaded = modules_after(
        "from transformer_jax import GPT, BERT, BART, Transformer, presets, init_params\n"
        "from transformer_jax import build_model, make_train_step\n"
        "import transformer_jax.objectives.mlm_nsp")
    assert not {*OPTIONAL, *NOT_USED} & loaded


@pytest.mark.slow
def test_import_initializes_no_backend():
    loaded = modules_after(
        "import transformer_jax.generation.api, transformer_jax.train.step\n"
        "import jax._src.xla_bridge as bridge\n"
        "assert not bridge.backends_are_initialized()")
    assert not set(NOT_USED) & loaded


def test_rooms_are_attributes_after_a_bare_import():
    checks = [f"assert {package}.__name__ == {package!r}" for package in PACKAGES]
    modules_after("\n".join(["import transformer_jax", *checks]))


@pytest.mark.parametrize("package", PACKAGES)
def test_dir_has_public_names_and_submodules(package):
    found = importlib.import_module(package)
    assert set(found.__all__) <= set(dir(found))
    files = {m.name for m in pkgutil.iter_modules(found.__path__) if not m.name.startswith("_")}
    assert files <= set(dir(found))


@pytest.mark.parametrize("package", PACKAGES)
def test_public_names_resolve(package):
    found = importlib.import_module(package)
    for name in found.__all__:
        assert getattr(found, name) is not None


@pytest.mark.slow
def test_modules_do_not_hide_functions_of_their_name():
    modules_after("import transformer_jax.pretrained.forward\n"
                  "from transformer_jax.pretrained import forward\n"
                  "assert forward.__name__ == 'forward'")


def test_documented_names_are_public():
    assert {"GPT", "BERT", "BART", "Transformer", "presets", "load_pretrained", "save_pretrained",
            "forward", "generate", "fill_mask", "generation_options", "trainable_mask",
            "make_train_step", "pretrain", "finetune", "evaluate", "predict",
            "models", "nn", "objectives", "train", "recipes", "generation", "finetuning",
            "pretrained", "data", "planner", "report", "cli"} <= set(dir(transformer_jax))
    assert callable(transformer_jax.generate) and callable(transformer_jax.finetune)
