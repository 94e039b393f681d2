"""Plans of tiny models on eight fake devices."""

import json

import jax
import pytest
import transformer_jax.cli.main as cli
from small_models import BART, BERT, GPT2

from transformer_jax.planner import chips, plan

CHIP = chips.Chip(flops=1e9, memory=2**30, bandwidth=1e9, network=1e9)
SIZES = {"num_layers": 3, "d_model": 64, "num_heads": 4, "mlp_dim": 256, "vocab_size": 512,
         "max_length": 64, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
MODELS = {"gpt2": GPT2.replace(**SIZES), "bert": BERT.replace(**SIZES),
          "bart": BART.replace(**SIZES, num_decoder_layers=2)}


@pytest.mark.parametrize("name", MODELS)
def test_the_program_does_what_the_model_needs(name):
    # Microbatches are a loop, whose body XLA counts once.
    setting = plan.PlanConfig(MODELS[name], {"data": 2, "fsdp": 4}, rows=32, length=64,
                           accumulate=2 if name == "gpt2" else 1)
    found = plan.compile_plan(setting, jax.devices(), CHIP)
    # More than the products: softmax, LayerNorm, GELU, AdamW, which a model so narrow feels.
    assert 1.0 < found.compiled_flops / found.model_flops < 1.5
    bytes_of_state = 3 * 4 * found.parameters  # AdamW has two numbers for each parameter
    assert bytes_of_state / 4 < found.state_bytes < bytes_of_state / 3  # biases are on all
    assert found.total_bytes >= found.state_bytes
    assert found.collectives.keys() >= {"all-gather", "all-reduce"}
    # What is gathered: every kernel, for the way forward and for the way back, at the least.
    assert found.collectives["all-gather"] > 2 * 0.5 * found.parameters * 3 / 4


def test_what_the_compiler_refuses_does_not_fit(monkeypatch):
    real = plan._compile

    def refuse(train_step, state, batch, mesh):
        if "layers" in state.params["decoder"]:  # the whole step, not those of few layers
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G "
                "hbm. Exceeded hbm capacity by 2.75G.")
        return real(train_step, state, batch, mesh)

    monkeypatch.setattr(plan, "_compile", refuse)
    setting = plan.PlanConfig(GPT2.replace(num_layers=1), {"data": 8}, rows=8, length=16)
    found = plan.compile_plan(setting, jax.devices(), CHIP)
    assert found.total_bytes == 18.5 * 2**30 and not found.fits
    assert found.state_bytes == pytest.approx(12 * found.parameters, rel=0.01)
    assert plan._needed("RESOURCE_EXHAUSTED: no more") == 2**63


def test_model_flops_by_hand():
    c = GPT2.replace(num_layers=2, d_model=8, num_heads=2, mlp_dim=16, vocab_size=10)
    tokens = 3 * 4
    layer = 2 * tokens * (4 * 8 * 8 + 2 * 8 * 16) + 4 * 3 * 4 * 4 * 8
    head = 2 * tokens * 8 * 10
    assert plan.model_flops(plan.PlanConfig(c, {}, rows=3, length=4)) == 3 * (2 * layer + head)


def test_times_and_what_follows_from_them():
    setting = plan.PlanConfig(GPT2, {"data": 1}, rows=8, length=16)
    made = plan.Plan(setting, 4, 10, 2**20, 2**20, 2**21, model_flops=1e9, compiled_flops=2e9,
                     bytes_read=1e9, collectives={"all-reduce": 5e8}, chip=CHIP,
                     compile_seconds=0.0)
    assert made.times == {"arithmetic": 2.0, "memory": 1.0, "network": 0.5}
    assert (made.step_seconds, made.mfu, made.fits) == (2.0, 0.5, True)
    assert made.tokens_per_day == 8 * 16 / 2 * 86_400
    slower = made._replace(bytes_read=4e9)
    larger = made._replace(total_bytes=2**31, compiled_flops=1e9)
    assert plan.best_plan([slower, larger, made]) is made
    assert plan.best_plan([larger]) is None


def test_settings_are_all_that_fit():
    made = plan.enumerate_configs(GPT2, 8, meshes={"data": (-1,), "fsdp": (1, 4, 3), "tensor": (1,)},
                         remat=("none", "full"))
    assert [(s.mesh["data"], s.mesh["fsdp"], s.rows, s.config.remat) for s in made] == [
        (8, 1, 32, "none"), (8, 1, 32, "full"), (2, 4, 32, "none"), (2, 4, 32, "full")]
    assert str(made[2]) == "data 2 x fsdp 4, 32 rows, remat none"
    with pytest.raises(ValueError, match=r"no mesh .* has 8 devices"):
        plan.enumerate_configs(GPT2, 8, meshes={"data": (3,)})


@pytest.mark.parametrize(("changes", "message"), [
    ({"mesh": {"data": 3}}, "does not fit 8 devices"),
    ({"rows": 12}, "12 rows cannot be shared by 8"),
    ({"rows": 8, "accumulate": 2}, "8 rows cannot be shared by 16"),
    ({"length": 99}, "length 99 is more than the model's 32 positions")])
def test_what_cannot_be_is_said_before_anything_is_compiled(changes, message):
    setting = plan.PlanConfig(GPT2, {"data": 8}, rows=8, length=16)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        plan.compile_plan(setting, jax.devices(), CHIP)


def test_the_command(monkeypatch, tmp_path, capsys):
    def make(setting, devices, chip):
        big = setting.config.remat == "none"
        return plan.Plan(setting, len(devices), 10, 2**30, 2**30, 2**35 if big else 2**31, 1e15,
                         2e15, 1e9, {"all-reduce": 5e8}, chip, 3.0)

    monkeypatch.setattr(chips, "devices_of", lambda topology: jax.devices())
    monkeypatch.setattr(plan, "make", make)
    assert cli.main(["plan", "gpt2", "--topology", "v5e:2x4", "--mesh.data", "2", "--mesh.fsdp",
                     "4", "--rows", "16", "--length", "32", "--remat", "none", "full",
                     "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    assert "data 2 x fsdp 4, 16 rows, remat none: compiled in 3 s" in said
    assert "best that fits: data 2 x fsdp 4, 16 rows, remat full" in said
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert [(one["fits"], one["model"]["kernel"]) for one in saved] == [
        (False, "auto"), (True, "auto")]
    assert saved[0]["times"]["arithmetic"] == pytest.approx(2e15 / 197e12)
    assert (tmp_path / "plan.png").stat().st_size > 1000


def test_what_is_here(monkeypatch):
    """Devices that are here are measured."""
    monkeypatch.setattr(chips.measure, "matmul_rate", lambda dtype: {"float32": 2e11}[dtype])
    monkeypatch.setattr(chips.measure, "read_rate", lambda: 2e10)
    chip = chips.chip_of("here", "float32")
    assert chip._replace(memory=0) == chips.Chip(2e11, 0, 2e10, 2e10)
    assert 2**26 < chip.memory < 2**50
    made = plan.compile_plan(plan.PlanConfig(GPT2, {}, rows=2, length=16), chips.devices_of("here")[:1], chip)
    assert made.devices == 1 and made.total_bytes == made.state_bytes + made.temporary_bytes
    assert 0.9 < made.compiled_flops / made.model_flops < 2  # small: products are not all


@pytest.mark.parametrize("topology", ["v9z:4x4", "16"])
def test_a_slice_that_nobody_makes(topology, capsys):
    assert cli.main(["plan", "gpt2", "--topology", topology]) == 2
    assert "is of no known chip; give one of v4, v5e, v5p, v6e" in capsys.readouterr().err
