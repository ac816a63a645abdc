"""The example of docs/serving.md, taken from its text, on image files."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ridgeline.artifacts.examples import Examples
from ridgeline.artifacts.model_evaluation import ModelEvaluation

pytestmark = pytest.mark.fresh_process
ROOT = Path(__file__).resolve().parents[2]
PYTHON = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "serving.md").read_text(), re.DOTALL | re.MULTILINE)


def test_the_example_classifies_files_as_the_evaluation_did(synthetic, synthetic_store, refs, tmp_path):
    (program,) = PYTHON
    (tmp_path / "classify.py").write_text(program)
    (tmp_path / "var").mkdir()
    (tmp_path / "var" / "store").symlink_to(synthetic[0].store)
    examples = synthetic_store.open(refs["transform"], Examples)
    for row in range(20):
        Image.fromarray(np.asarray(examples.split("test").images[row])).convert("RGB").save(tmp_path / f"{row}.png")
    files = [f"{row}.png" for row in range(20)]
    done = subprocess.run(
        [sys.executable, "classify.py", "synthetic_garments", *files],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    expected = synthetic_store.open(refs["evaluate"], ModelEvaluation).predictions()[:20]
    names = [examples.facts.class_names[label] for label in expected.argmax(axis=1)]
    assert done.stdout.splitlines() == [
        f"{file}: {name}, probability {p:.2f}" for file, name, p in zip(files, names, expected.max(axis=1), strict=True)
    ]
