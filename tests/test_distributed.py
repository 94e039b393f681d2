"""Process setup. Settings of the allocator last as long as a process, so they are tested in new
processes."""

import fnmatch
import os
import platform
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from transformer_jax import distributed

SCRIPT = """
import resource
from transformer_jax.distributed import configure_malloc
{call}
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        bytearray(64 * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


def page_faults(call: str) -> int:
    script = SCRIPT.format(call=call)
    return int(subprocess.check_output([sys.executable, "-c", script]))


@pytest.mark.slow
def test_configure_malloc_keeps_freed_memory():
    if platform.libc_ver()[0] != "glibc":
        assert page_faults("assert not configure_malloc()") >= 0
        return
    assert page_faults("assert configure_malloc()") < 0.1 * page_faults("")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_malloc_trim_returns_freed_memory():
    script = """
from transformer_jax.distributed import configure_malloc, malloc_trim
def resident_megabytes():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
configure_malloc()
before = resident_megabytes()
low, hole, high = (bytearray(64 * 2**20) for _ in range(3))
for part in (low, hole, high):
    part[::4096] = bytes(len(part[::4096]))
del hole
untrimmed = resident_megabytes() - before
assert malloc_trim()
print(untrimmed, resident_megabytes() - before)
"""
    untrimmed, trimmed = map(
        float, subprocess.check_output([sys.executable, "-c", script]).split())
    assert untrimmed > 180 and trimmed < 140


STEPS = """
import resource
{call}
import jax, jax.numpy as jnp
step = jax.jit(lambda x: jnp.flip(x * 2) @ jnp.ones((2**11, 2**11)) / 2**12)
x = jnp.ones((2**11, 2**11))
for _ in range(6):
    x = step(x).block_until_ready()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    x = step(x).block_until_ready()
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.slow
@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_the_setup_of_scripts_reduces_the_page_faults_of_steps(tmp_path):
    """The number that remains depends on other allocations; after JAX has started, all remain."""
    def faults(call):
        script = STEPS.format(call=call)
        output = subprocess.check_output(
            [sys.executable, "-c", script], text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "TRANSFORMER_JAX_CACHE": str(tmp_path)})
        return int(output.split("faults")[1])

    setup = "from transformer_jax.recipes import run_dir; run_dir.setup()"
    assert faults(setup) < 0.75 * faults("")


def test_platform_is_cpu(monkeypatch):
    for platforms, expected in (("cpu", True), ("cpu,cuda", True), ("cuda", False),
                                ("tpu,cpu", False)):
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        assert distributed.platform_is_cpu() == expected
    monkeypatch.delenv("JAX_PLATFORMS")
    devices = []
    monkeypatch.setattr(Path, "glob", lambda self, name: iter(d for d in devices
                                                              if fnmatch.fnmatch(d, name)))
    assert distributed.platform_is_cpu()
    for name in ("nvidia0", "accel0", "vfio/0", "kfd"):
        devices[:] = [name]
        assert not distributed.platform_is_cpu()
    devices[:] = ["nvidiactl"]
    assert distributed.platform_is_cpu()


def test_compilation_cache_dir_depends_on_the_device_and_the_cpu(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFORMER_JAX_CACHE", str(tmp_path))
    cpu, tpu = map(distributed.compilation_cache_dir, ("cpu", "TPU v5 lite"))
    assert cpu.parent == tpu.parent == tmp_path / "compiled"
    assert cpu != tpu and " " not in tpu.name
    assert distributed.compilation_cache_dir("cpu") == cpu
    monkeypatch.setattr(Path, "read_text", lambda self: "flags : other instructions")
    assert distributed.compilation_cache_dir("cpu") != cpu


def test_the_module_does_not_import_jax():
    script = "import sys, transformer_jax.distributed; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_print_devices_warns_if_the_platform_is_missing(capsys):
    assert distributed.print_devices() and distributed.print_devices("cpu")
    assert "!!" not in capsys.readouterr().out
    assert not distributed.print_devices("tpu")
    output = capsys.readouterr().out
    assert "8 x cpu (cpu)" in output
    assert "NO TPU FOUND" in output and "Change runtime type" in output


ADDRESS = {"JAX_COORDINATOR_ADDRESS": "host:1234"}
ENVIRONMENTS = [
    ({}, None),
    (ADDRESS | {"SLURM_STEP_NUM_TASKS": "4"}, ()),  # JAX itself reads the address
    (ADDRESS | {"TRANSFORMER_JAX_DISTRIBUTED": "1"}, ()),
    ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "1"}, None),
    ({"SLURM_STEP_NUM_TASKS": "4"}, ()),
    ({"OMPI_COMM_WORLD_SIZE": "2"}, ()),
    ({"TPU_WORKER_HOSTNAMES": "a"}, None),
    ({"TPU_WORKER_HOSTNAMES": "a,b"}, ()),
    ({"TRANSFORMER_JAX_DISTRIBUTED": "1"}, ()),
    (ADDRESS | {"JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"}, ("host:1234", 3, 2)),
]


@pytest.mark.parametrize(("environment", "arguments"), ENVIRONMENTS, ids=str)
def test_initialize_reads_the_environment(monkeypatch, environment, arguments):
    calls = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **options: calls.append(args))
    assert not distributed.initialize(environment)
    assert calls == ([] if arguments is None else [arguments])


@pytest.mark.parametrize(("changes", "message"), [
    ({}, "JAX_COORDINATOR_ADDRESS is set, but JAX_NUM_PROCESSES, JAX_PROCESS_ID is not; set all"),
    ({"JAX_NUM_PROCESSES": "2"}, "JAX_PROCESS_ID is not; set all three"),
    ({"JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
     "JAX_PROCESS_ID is '2' and JAX_NUM_PROCESSES is '2'"),
    ({"JAX_NUM_PROCESSES": "two", "JAX_PROCESS_ID": "0"}, "numbered from 0")])
def test_incomplete_or_invalid_variables_are_an_error(changes, message):
    with pytest.raises(ValueError, match=message):
        distributed.initialize(ADDRESS | changes)
