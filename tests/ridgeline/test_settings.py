from pathlib import Path

import pytest

from ridgeline.settings import Settings
from ridgeline.store import StoreError


def test_settings_come_from_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    monkeypatch.setenv("RIDGELINE_MANUAL_DIR", "/files")
    settings = Settings()
    assert settings.open_store().local == tmp_path / "store"
    assert settings.serving_dir() == tmp_path / "store" / "serving"
    assert settings.manual_dir == Path("/files")
    monkeypatch.setenv("RIDGELINE_SERVING", str(tmp_path / "served"))
    assert Settings().serving_dir() == tmp_path / "served"


def test_the_registry_takes_its_settings(monkeypatch, tmp_path):
    monkeypatch.setenv("RIDGELINE_STORE", str(tmp_path / "store"))
    registry = Settings().open_registry()
    served = tmp_path / "store" / "serving"
    assert (registry.root, registry.keep_versions, registry.base_path) == (served, 10, str(served))
    monkeypatch.setenv("RIDGELINE_KEEP_VERSIONS", "3")
    monkeypatch.setenv("RIDGELINE_SERVING_BASE_PATH", "/models")
    registry = Settings().open_registry()
    assert (registry.keep_versions, registry.base_path) == (3, "/models")
    monkeypatch.setenv("RIDGELINE_KEEP_VERSIONS", "0")
    with pytest.raises(ValueError, match="greater than or equal to 1"):
        Settings()


def test_an_empty_variable_is_not_set(monkeypatch):
    for name in ("STORE", "SCHEDULE", "KEEP_VERSIONS", "DEFAULTS", "SERVING"):  # as docker/compose.yaml passes them
        monkeypatch.setenv(f"RIDGELINE_{name}", "")
    settings = Settings()
    assert (settings.store, settings.schedule, settings.keep_versions) == ("var/store", "@weekly", 10)
    assert (settings.defaults, settings.serving) == ({}, None)


def test_remote_store_needs_a_serving_folder():
    with pytest.raises(StoreError, match="RIDGELINE_SERVING"):
        Settings(store="memory://bucket").serving_dir()
