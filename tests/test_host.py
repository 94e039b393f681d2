"""In a process of its own: the allocator's settings last as long as the process."""

import platform
import subprocess
import sys
from pathlib import Path

from transformer_jax import host

SCRIPT = """
import resource
from transformer_jax.host import keep_freed_memory
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


def test_what_is_compiled_is_kept_apart_by_kind(monkeypatch, tmp_path):
    monkeypatch.setenv("TRANSFORMER_JAX_CACHE", str(tmp_path))
    cpu, tpu = host.compiled_folder("cpu"), host.compiled_folder("TPU v5 lite")
    assert cpu.parent == tpu.parent == tmp_path / "compiled"
    assert cpu != tpu and " " not in tpu.name
    assert host.compiled_folder("cpu") == cpu
    monkeypatch.setattr(Path, "read_text", lambda self: "flags : another kind")
    assert host.compiled_folder("cpu") != cpu
