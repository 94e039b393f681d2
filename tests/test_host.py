"""In a process of its own: the allocator's settings last as long as the process."""

import fnmatch
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from transformer_jax import distributed

SCRIPT = """
import resource
from transformer_jax.distributed import keep_freed_memory
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


def test_freed_buffers_are_kept():
    if platform.libc_ver()[0] != "glibc":
        assert page_faults("assert not keep_freed_memory()") >= 0
        return
    assert page_faults("assert keep_freed_memory()") < 0.1 * page_faults("")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_given_back_when_asked_for():
    script = """
from transformer_jax.distributed import give_back_freed_memory, keep_freed_memory
def held():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20
keep_freed_memory()
before = held()
low, hole, high = (bytearray(64 * 2**20) for _ in range(3))
for part in (low, hole, high):
    part[::4096] = bytes(len(part[::4096]))
del hole
kept = held() - before
assert give_back_freed_memory()
print(kept, held() - before)
"""
    kept, left = map(float, subprocess.check_output([sys.executable, "-c", script]).split())
    assert kept > 180 and left < 140


STEPS = """
import resource, sys
sys.path.insert(0, {experiments!r})
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


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_scripts_call_first_spares_the_steps_their_page_faults(tmp_path):
    """How many are left depends on what is allocated beside; called too late, all are."""
    def faults(call):
        script = STEPS.format(call=call, experiments=str(Path(__file__).parents[1] / "experiments"))
        said = subprocess.check_output(
            [sys.executable, "-c", script], text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu", "TRANSFORMER_JAX_CACHE": str(tmp_path)})
        return int(said.split("faults")[1])

    assert faults("import common; common.start()") < 0.75 * faults("")


def test_the_cpu_is_known_before_jax_starts(monkeypatch):
    for platforms, expected in (("cpu", True), ("cpu,cuda", True), ("cuda", False), ("tpu,cpu",
                                                                                   False)):
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


def test_what_is_compiled_is_kept_apart_by_kind(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFORMER_JAX_CACHE", str(tmp_path))
    cpu, tpu = distributed.compilation_cache_dir("cpu"), distributed.compilation_cache_dir("TPU v5 lite")
    assert cpu.parent == tpu.parent == tmp_path / "compiled"
    assert cpu != tpu and " " not in tpu.name
    assert distributed.compilation_cache_dir("cpu") == cpu
    monkeypatch.setattr(Path, "read_text", lambda self: "flags : another kind")
    assert distributed.compilation_cache_dir("cpu") != cpu


def test_it_can_be_called_before_jax_is_there():
    script = "import sys, transformer_jax.distributed; assert 'jax' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_missing_accelerator_is_said_loudly(capsys):
    assert distributed.print_devices() and distributed.print_devices("cpu")
    assert "!!" not in capsys.readouterr().out
    assert not distributed.print_devices("tpu")
    said = capsys.readouterr().out
    assert "8 x cpu (cpu)" in said and "NO TPU HERE" in said and "Change runtime type" in said
