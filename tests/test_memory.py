"""Freed memory is kept: the system need not fetch and clear pages again at every update."""

import os
import resource
import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys
import numpy as np
from dawm.nn.memory import keep_freed_memory

kept = keep_freed_memory() if sys.argv[1] == "keep" else None
for index in range(40):  # as an update does: eight pieces of a megabyte, and all freed
    if index == 20:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [np.ones(2**17) for _ in range(8)]
    del pieces
print(kept, resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way, **environment):
    """What `keep_freed_memory` returned, and the pages fetched in twenty rounds."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")} | environment
    command = [sys.executable, "-c", SCRIPT, way]
    kept, count = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
    return kept, int(count)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_it_is_not_fetched_again():
    pages = 20 * 8 * 2**20 // resource.getpagesize()
    kept, count = faults("keep")
    assert kept == "True"
    assert count < pages / 10
    assert faults("leave")[1] > pages / 2, "there is nothing to mend"


def test_settings_of_the_user_stay():
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="1000000")[0] == "False"
