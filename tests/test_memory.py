import subprocess
import sys

import pytest

PAGES = """
import resource
import numpy as np
from anomri.runtime.memory import keep_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        np.ones(2**23)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

keep_memory()
faults()
print(faults())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other C libraries are left as they are")
def test_freed_memory_is_kept_for_the_next_volume() -> None:
    """Twenty blocks of 64 MiB, one after the other, are one: no page of theirs has to be found
    anew."""
    done = subprocess.run([sys.executable, "-c", PAGES], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 20
