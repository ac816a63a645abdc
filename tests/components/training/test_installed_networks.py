"""Networks of other packages: found by entry point, in the key of a training that uses them, named if unusable."""

import importlib.metadata
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from components.training.installed_networks import load_networks
from components.training.params import RESERVED, Params
from ridgeline import pipeline
from ridgeline.component import Params as BaseParams

ROOT = Path(__file__).resolve().parents[3]
NETWORK = '''
from typing import ClassVar
from pydantic import Field
from further_net.size import units
from ridgeline.component import Params

class Options(Params):
    depth: int = Field(1, ge=1, le=3, title="Depth", description="Number of layers, 1 to 3.")
    sizes: tuple[int, ...] = (4,)

def wide(image_shape, num_classes, regularizer, options: Options):
    """A wide network."""
    import keras
    from components.networks.mlp import Options as Size, mlp
    return mlp(image_shape, num_classes, regularizer, Size(hidden_units=(units(),) * options.depth))

def with_default(image_shape, num_classes, regularizer, options=None): ...
def of_other_arguments(shape, options: Options): ...

class Required(Params):
    depth: int

def without_default(image_shape, num_classes, regularizer, options: Required): ...

class ByName(Params):
    sizes: dict[str, int] = {}

def by_name(image_shape, num_classes, regularizer, options: ByName): ...

class Circular(Params):
    tuned: ClassVar = {"profile": "tuned", "epochs": 3}

def circular(image_shape, num_classes, regularizer, options: Circular): ...

class Mistuned(Options):
    tuned: ClassVar = {"epochs": 3, "epoch": 3, "a": {"sizes": (3,), "size": 3}}

def mistuned(image_shape, num_classes, regularizer, options: Mistuned): ...

no_function = 3
'''
STATE = """
import json
from components.sweep import sweep
from components.train import train
from ridgeline.keys import key_parts
chosen = {"network": "wide", "wide": {"depth": 2, "sizes": [5, 6]}}
parts = {"train": key_parts(train, {}, train.parse({})), "sweep": key_parts(sweep, {}, sweep.parse({}))}
if "wide" in train.params.model_fields:
    parts |= {"wide": key_parts(train, {}, train.parse(chosen))}
    parts |= {"wide sweep": key_parts(sweep, {}, sweep.parse({"train": chosen}))}
print(json.dumps({name: found.model_dump() | {"key": found.key()} for name, found in parts.items()}))
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a package of networks, in front of the installed packages."""
    package = tmp_path / "further_net"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "ends.py").write_text("raise SystemExit(3)")
    (package / "broken.py").write_text("import sys\nimport lost_library\n")
    (package / "network.py").write_text(NETWORK)
    (package / "size.py").write_text("import scipy\ndef units(): return 300\n")
    (tmp_path / "single_file.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] in ("further_net", "single_file")]:
        del sys.modules[name]


def installed(folder):
    """Install the package: write its entry points, of which one can't be imported."""
    info = folder / "further_net-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: further-net\nVersion: 1.0\n")
    entries = "wide = further_net.network:wide\nlost = further_net.lost:lost\n"
    (info / "entry_points.txt").write_text(f"[ridgeline.networks]\n{entries}")


def python(folder, *arguments):
    environment = {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{ROOT}", "RIDGELINE_STORE": str(folder / "store")}
    return subprocess.run(
        [sys.executable, "-P", *arguments], env=environment, capture_output=True, text=True, cwd=folder, check=False
    )


def test_the_built_in_networks_can_be_used():
    networks = load_networks(RESERVED)
    assert {name: found.module for name, found in networks.items() if not found.problem} == {
        "cnn": "components.networks.cnn",
        "mlp": "components.networks.mlp",
    }
    assert networks["mlp"].label == "mlp: Multilayer perceptron"


@pytest.mark.parametrize(
    ("entries", "problem"),
    [
        ([("a", "further_net.lost:a")], "entry point further_net.lost:a can't be used: ModuleNotFoundError: No module"),
        ([("a", "further_net.network:lost")], "AttributeError: module 'further_net.network' has no attribute 'lost'"),
        ([("a", "further_net.network:with_default")], "its argument options is annotated with .*Any, not with a"),
        ([("a", "further_net.network:of_other_arguments")], "no function of image_shape, num_classes, regularizer, op"),
        ([("a", "further_net.network:no_function")], "it is no function of"),
        ([("a", "further_net.network:without_default")], "Required.depth has no default. Give it one.$"),
        ([("a", "further_net.broken:wide")], r"No module named 'lost_library' \(.*/further_net/broken.py, line 2\)\.$"),
        ([("a", "further_net.network:mistuned")], "its tuned values name epoch, a.size, but no parameter is called so"),
        ([("a", "single_file:wide")], "single_file is no package, so its code can't be followed"),
        ([("epochs", "further_net.network:wide")], "its name is that of another parameter, or no identifier"),
        ([("copy", "further_net.network:wide")], "its name is that of another parameter, or no identifier"),
        ([("_mine", "further_net.network:wide")], "its name is that of another parameter, or no identifier"),
        ([("a", "further_net.ends:wide")], "entry point further_net.ends:wide can't be used: SystemExit: 3"),
        ([("a", "further_net.network:by_name")], "its options sizes have values by name, which a form can't show"),
        ([("a", "further_net.network:circular")], "its tuned values set profile, which select them. Remove it"),
        ([("a b", "further_net.network:wide")], "its name is that of another parameter, or no identifier"),
        (
            [("a", "further_net.network:wide"), ("a", "other:net")],
            "further_net.network:wide and other:net have the same name. Remove or rename one",
        ),
    ],
)
def test_what_cannot_be_used_says_why_and_leaves_the_others_alone(folder, monkeypatch, caplog, entries, problem):
    found = [importlib.metadata.EntryPoint(name, value, "ridgeline.networks") for name, value in entries]
    found.append(importlib.metadata.EntryPoint("wide", "further_net.network:wide", "ridgeline.networks"))
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: found)
    caplog.set_level("INFO")
    networks = load_networks({"epochs"})
    bad = networks[entries[0][0]]
    with pytest.raises(ValueError, match=problem):
        raise ValueError(bad.problem)
    assert bad.label == f"{bad.name}: can't be used"
    assert f"cannot use the network {bad.name}: {bad.problem}" in caplog.text
    assert networks["wide"].problem == ""
    assert networks["wide"].options.model_validate({"depth": 2}).model_dump() == {"depth": 2, "sizes": (4,)}


def test_a_further_network_changes_no_key_and_its_own_covers_its_code(folder):
    before = json.loads(python(folder, "-c", STATE).stdout)
    assert before.keys() == {"train", "sweep"}
    assert "components/networks/mlp.py" in before["train"]["code"]
    assert "components/networks/mlp.py" in before["sweep"]["code"]
    assert "components/networks/cnn.py" not in before["train"]["code"]
    installed(folder)
    now = json.loads(python(folder, "-c", STATE).stdout)
    assert {name: now[name] for name in before} == before
    for name in ("wide", "wide sweep"):
        assert now[name]["code"].keys() - before["train"]["code"].keys() >= {
            "further_net/__init__.py", "further_net/network.py", "further_net/size.py",
        }  # fmt: skip
        assert {"components/networks/mlp.py", "components/training/engine.py"} <= now[name]["code"].keys()
        assert now[name]["libraries"].keys() == before["train"]["libraries"].keys() | {"scipy"}
    params = now["wide"]["params"]
    assert (params["network"], params["wide.depth"], params["wide.sizes"]) == ("wide", 2, [5, 6])
    assert "mlp.hidden_units" not in params
    (folder / "further_net" / "size.py").write_text("import scipy\ndef units(): return 200\n")
    edited = json.loads(python(folder, "-c", STATE).stdout)
    assert {name for name in now if now[name]["key"] != edited[name]["key"]} == {"wide", "wide sweep"}


def test_a_network_that_cannot_be_imported_is_named_by_explain(folder):
    installed(folder)
    explain = ("-m", "ridgeline.cli", "explain", "train", "--set", "ingest.dataset=synthetic_garments:1.0.0")
    others = python(folder, *explain)
    assert others.returncode == 0
    for help_of in ("explain", "step train"):
        assert "cannot use the network lost" in python(folder, "-m", "ridgeline.cli", *help_of.split(), "--help").stderr
    elsewhere = python(folder, "-m", "ridgeline.cli", "models", "list")
    assert (elsewhere.returncode, elsewhere.stderr) == (0, "")
    assert "cannot use the network lost: its entry point further_net.lost:lost can't be used" in others.stderr
    chosen = python(folder, *explain, "--set", "train.network=lost")
    assert chosen.returncode == 1
    assert "Parameter train.network: cannot use lost: its entry point further_net.lost:lost" in chosen.stderr
    unknown = python(folder, *explain, "--set", "train.network=nosuch")
    assert "Parameter train.network: expected 'cnn', 'mlp' or 'wide'; received 'nosuch'." in unknown.stderr
    assert python(folder, *explain, "--set", "train.network=wide", "--set", "train.wide.depth=2").returncode == 0
    deep = python(folder, *explain, "--set", "train.network=wide", "--set", "train.wide.depth=4")
    assert "train.wide.depth: expected less than or equal to 3; received 4" in deep.stderr


def test_a_network_that_imports_keras_at_module_level_is_refused(folder, monkeypatch):
    monkeypatch.delitem(sys.modules, "keras", raising=False)
    (folder / "keras.py").write_text("")
    (folder / "further_net" / "heavy.py").write_text("import keras\n" + NETWORK)
    monkeypatch.syspath_prepend(folder)
    entry = importlib.metadata.EntryPoint("a", "further_net.heavy:wide", "ridgeline.networks")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    try:
        assert "it imports keras at module level" in load_networks(())["a"].problem
    finally:
        sys.modules.pop("keras", None)  # the empty file


def test_no_attribute_of_the_parameters_can_be_the_name_of_a_network():
    attributes = {name for name in vars(Params) if not name.startswith("_")} - set(Params.model_fields)
    assert attributes <= set(RESERVED) | set(dir(BaseParams))


def test_a_file_of_a_network_that_cannot_be_parsed_stops_no_other_step(folder, monkeypatch):
    (folder / "further_net" / "old.py").write_text("print 'x'")
    broken = replace(pipeline.load_components()["train"], code=lambda params: ("further_net.network",))
    entry = SimpleNamespace(name="train", value="", load=lambda: broken)
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [entry])
    assert set(pipeline.load_components()) == {"train"}
