import os
import subprocess
import sys

import pytest


@pytest.mark.fresh_process
@pytest.mark.parametrize("first", ["tensorflow", "keras"])
def test_it_is_imported_without_its_noise_and_the_libraries_that_no_step_needs(first):
    code = f"""
import gc, os, sys
from ridgeline import quiet_tensorflow
class Other:  # prints a line that must not be filtered
    def find_spec(self, name, path=None, target=None):
        if name == "tensorflow.python":
            os.write(2, b"E0000 something is wrong\\n")
sys.meta_path.insert(0, Other())
quiet_tensorflow.install()
quiet_tensorflow.install()
import {first}
assert not {{"matplotlib", "sklearn"}} & sys.modules.keys()
assert gc.isenabled()
import matplotlib.pyplot, sklearn
os.write(2, b"after\\n")
"""
    env = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stderr == "E0000 something is wrong\nafter\n"
