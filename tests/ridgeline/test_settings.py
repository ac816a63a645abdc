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


def test_remote_store_needs_a_serving_folder():
    with pytest.raises(StoreError, match="RIDGELINE_SERVING"):
        Settings(store="memory://bucket").serving_dir()
