"""Arrays of whole blocks: zeros that lie outside of the heap and go back at once."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from segpipe.pages import block_zeros


@pytest.mark.parametrize("shape", [(3, 5, 7), (0, 4), (3, 1024, 1024), (2**22,)])
@pytest.mark.parametrize("dtype", ["bool", "uint8", "float32"])
def test_they_are_like_those_of_numpy(shape: tuple[int, ...], dtype: str) -> None:
    found, wanted = block_zeros(shape, dtype), np.zeros(shape, dtype)
    assert (found.shape, found.dtype, found.strides) == (wanted.shape, wanted.dtype, wanted.strides)
    assert found.flags.c_contiguous
    assert found.flags.writeable
    assert found.flags.aligned
    assert not found.any()
    found[...] = 1
    assert found.all()


def test_a_view_keeps_the_pages() -> None:
    view = block_zeros((3, 1024, 1024), np.uint8)[1:]
    view += 7
    assert (view == 7).all()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_pages_go_back_at_once_even_where_the_heap_keeps_its_own() -> None:
    code = """
import numpy as np
from segpipe.inference.memory import keep_freed_pages
from segpipe.pages import block_zeros

def resident_mb():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096 / 2**20

keep_freed_pages()
before, held = resident_mb(), []
for size_mb in range(20, 30):
    block = block_zeros((size_mb, 1024, 1024), np.uint8)
    block += 1
    held.append(bytearray(2**19))  # what would split the hole that the block leaves
    del block
print(resident_mb() - before)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert float(run.stdout) < 12


@pytest.mark.skipif(sys.platform != "linux", reason="a limit on address space")
def test_too_much_is_a_memory_error() -> None:
    code = """
import resource
from segpipe.pages import block_zeros
resource.setrlimit(resource.RLIMIT_AS, (2**31, 2**31))
try:
    block_zeros((2**32,), "uint8")
except MemoryError as error:
    print(error)
"""
    run = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "4294967296 bytes" in run.stdout
