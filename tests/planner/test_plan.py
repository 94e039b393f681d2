"""Plans of tiny models on eight fake devices."""

import json

import jax
import numpy as np
import pytest
from small_models import BART, BERT, GPT2

import transformer_jax.cli.main as cli
from transformer_jax.planner import chips, plan, plan_config
from transformer_jax.planner.plan_config import PlanConfig

CHIP = chips.Chip(flops_per_second=1e9, memory_bytes=2**30, memory_bandwidth=1e9,
                  interconnect_bandwidth=1e9)
SIZES = {"num_layers": 3, "d_model": 64, "num_heads": 4, "mlp_dim": 256, "vocab_size": 512,
         "max_length": 64, "dropout_rate": 0.0, "attention_dropout_rate": 0.0}
MODELS = {"gpt2": GPT2.replace(**SIZES), "bert": BERT.replace(**SIZES),
          "bart": BART.replace(**SIZES, num_decoder_layers=2)}


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_costs_of_the_compiled_step_match_the_model(name):
    # XLA counts the loop over microbatches once; the plan must not.
    config = PlanConfig(MODELS[name], {"data": 2, "fsdp": 4}, batch_size=32, length=64,
                        accumulate=2 if name == "gpt2" else 1)
    found = plan.compile_plan(config, jax.devices(), CHIP)
    # Softmax, LayerNorm, GELU and AdamW add FLOPs, a large fraction in so narrow a model.
    assert 1.0 < found.compiled_flops / found.model_flops < 1.5
    bytes_of_state = 3 * 4 * found.num_params  # AdamW stores two moments for each parameter
    # Biases are replicated on all devices.
    assert bytes_of_state / 4 < found.state_bytes < bytes_of_state / 3
    assert found.peak_bytes >= found.state_bytes
    assert found.collective_bytes.keys() >= {"all-gather", "all-reduce"}
    # At least every kernel is gathered for the forward pass and again for the backward pass.
    assert found.collective_bytes["all-gather"] > 2 * 0.5 * found.num_params * 3 / 4


@pytest.mark.slow
def test_a_step_that_the_compiler_rejects_does_not_fit(monkeypatch):
    compile_step = plan._compile

    def out_of_memory(train_step, state, batch, mesh):
        if "layers" in state.params["decoder"]:  # the full step, not the steps of few layers
            raise jax.errors.JaxRuntimeError(
                "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 18.50G of 15.75G "
                "hbm. Exceeded hbm capacity by 2.75G.")
        return compile_step(train_step, state, batch, mesh)

    monkeypatch.setattr(plan, "_compile", out_of_memory)
    config = PlanConfig(GPT2.replace(num_layers=1), {"data": 8}, batch_size=8, length=16)
    found = plan.compile_plan(config, jax.devices(), CHIP)
    assert found.peak_bytes == 18.5 * 2**30 and not found.fits
    assert found.state_bytes == pytest.approx(12 * found.num_params, rel=0.01)
    assert plan._bytes_needed("RESOURCE_EXHAUSTED: no more") == 2**63


def test_model_flops_by_hand():
    c = GPT2.replace(num_layers=2, d_model=8, num_heads=2, mlp_dim=16, vocab_size=10)
    tokens = 3 * 4
    layer = 2 * tokens * (4 * 8 * 8 + 2 * 8 * 16) + 4 * 3 * 4 * 4 * 8
    head = 2 * tokens * 8 * 10
    assert plan.model_flops(PlanConfig(c, {}, batch_size=3, length=4)) == 3 * (2 * layer + head)


def test_roofline_times_and_derived_quantities():
    config = PlanConfig(GPT2, {"data": 1}, batch_size=8, length=16)
    found = plan.Plan(config, 4, 10, 2**20, 2**20, 2**21, model_flops=1e9, compiled_flops=2e9,
                     bytes_accessed=1e9, collective_bytes={"all-reduce": 5e8}, chip=CHIP,
                     compile_seconds=0.0)
    assert found.roofline_seconds == {"compute": 2.0, "hbm": 1.0, "interconnect": 0.5}
    assert (found.step_seconds, found.mfu, found.fits) == (2.0, 0.5, True)
    assert found.tokens_per_day == 8 * 16 / 2 * 86_400
    slower = found._replace(bytes_accessed=4e9)
    larger = found._replace(peak_bytes=2**31, compiled_flops=1e9)
    assert plan.best_plan([slower, larger, found]) is found
    assert plan.best_plan([larger]) is None


def test_enumerated_configs_are_all_that_match_the_devices():
    configs = plan_config.enumerate_configs(
        GPT2, 8, meshes={"data": (-1,), "fsdp": (1, 4, 3), "tensor": (1,)},
        remat=("none", "full"))
    assert [(c.mesh["data"], c.mesh["fsdp"], c.batch_size, c.model.remat) for c in configs] == [
        (8, 1, 32, "none"), (8, 1, 32, "full"), (2, 4, 32, "none"), (2, 4, 32, "full")]
    assert str(configs[2]) == "data 2 x fsdp 4, batch size 32, remat none"
    with pytest.raises(ValueError, match=r"no mesh .* has 8 devices"):
        plan_config.enumerate_configs(GPT2, 8, meshes={"data": (3,)})


@pytest.mark.parametrize(("changes", "message"), [
    ({"mesh": {"data": 3}}, "does not fit 8 devices"),
    ({"batch_size": 12}, "batch size is 12; it must be a multiple of 8"),
    ({"batch_size": 8, "accumulate": 2}, "batch size is 8; it must be a multiple of 16"),
    ({"length": 99}, "length is 99; it must be at most the model's max_length, 32")])
def test_invalid_configs_are_rejected_before_compilation(changes, message):
    config = PlanConfig(GPT2, {"data": 8}, batch_size=8, length=16)._replace(**changes)
    with pytest.raises(ValueError, match=message):
        plan.compile_plan(config, jax.devices(), CHIP)


@pytest.mark.slow
def test_plan_command(monkeypatch, tmp_path, capsys):
    def compile_plan(config, devices, chip):
        peak_bytes = 2**35 if config.model.remat == "none" else 2**31
        return plan.Plan(config, len(devices), 10, 2**30, 2**30, peak_bytes, 1e15, 2e15, 1e9,
                         {"all-reduce": 5e8}, chip, 3.0)

    monkeypatch.setattr(chips, "get_devices", lambda topology: jax.devices())
    monkeypatch.setattr(plan, "compile_plan", compile_plan)
    assert cli.main(["plan", "gpt2", "--topology", "v5e:2x4", "--mesh.data", "2", "--mesh.fsdp",
                     "4", "--batch-size", "16", "--length", "32", "--remat", "none", "full",
                     "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert "data 2 x fsdp 4, batch size 16, remat none: compiled in 3 s" in printed
    assert "best that fits: data 2 x fsdp 4, batch size 16, remat full" in printed
    saved = json.loads((tmp_path / "plan.json").read_text())
    assert [(one["fits"], one["model"]["attention_impl"]) for one in saved] == [
        (False, "auto"), (True, "auto")]
    assert saved[0]["roofline_seconds"]["compute"] == pytest.approx(2e15 / 197e12)
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.slow
def test_local_devices_are_measured(monkeypatch):
    monkeypatch.setattr(chips, "matmul_flops_per_second",
                        lambda dtype: {"float32": 2e11}[dtype])
    monkeypatch.setattr(chips, "memory_bandwidth", lambda: 2e10)
    chip = chips.get_chip("local", "float32")
    assert chip._replace(memory_bytes=0) == chips.Chip(2e11, 0, 2e10, 2e10)
    assert 2**26 < chip.memory_bytes < 2**50
    config = PlanConfig(GPT2, {}, batch_size=2, length=16)
    found = plan.compile_plan(config, chips.get_devices("local")[:1], chip)
    assert found.num_devices == 1 and found.peak_bytes == found.state_bytes + found.temporary_bytes
    # In a small model matrix products are only a part of the FLOPs.
    assert 0.9 < found.compiled_flops / found.model_flops < 2


@pytest.mark.parametrize("topology", ["v9z:4x4", "16"])
def test_unknown_chips_are_rejected(topology, capsys):
    assert cli.main(["plan", "gpt2", "--topology", topology]) == 2
    assert "choose one of v4, v5e, v5p, v6e, local" in capsys.readouterr().err
    with pytest.raises(ValueError, match=f"topology {topology!r} has an unknown chip"):
        chips.get_chip(topology, "float32")


def test_similar_chips_are_suggested():
    with pytest.raises(ValueError, match=r"such as v5e:16x16.*did you mean v5p or v5e"):
        chips.get_chip("v5:4x4", "float32")


def test_an_error_of_the_compiler_that_is_not_about_memory_is_raised(monkeypatch):
    def fail(*arguments):
        raise jax.errors.JaxRuntimeError("INTERNAL: Mosaic failed to compile the kernel")

    monkeypatch.setattr(plan, "_compile", fail)
    config = PlanConfig(GPT2.replace(num_layers=1), {"data": 8}, batch_size=8, length=16)
    with pytest.raises(jax.errors.JaxRuntimeError, match="Mosaic failed"):
        plan.compile_plan(config, jax.devices(), CHIP)


def test_costs_are_extrapolated_from_two_and_three_layers(monkeypatch):
    """One layer costs 10 more than it does in a deeper model, as if XLA fused it differently."""
    def cost(config, mesh, num_layers, num_decoder_layers=0):
        layers = 5 * num_layers + 7 * num_decoder_layers
        return np.array([1.0, 2.0]) * (100 + layers + 10 * (num_layers == 1))

    monkeypatch.setattr(plan, "_unrolled_cost", cost)
    for num_layers, expected in ((1, 115), (2, 110), (3, 115), (12, 160)):
        config = PlanConfig(GPT2.replace(num_layers=num_layers), {}, batch_size=8, length=16)
        assert plan._per_device_cost(config, None) == (expected, 2 * expected)
    config = PlanConfig(BART.replace(num_layers=4, num_decoder_layers=6), {}, 8, 16)
    assert plan._per_device_cost(config, None) == (162, 324)
