from __future__ import annotations

import json

import pytest

from ridgeline.resources import StepResources
from ridgeline.settings import Settings, SettingsError

GIVEN = {"train": {"cpu": 4, "memory": "8Gi", "disk": "20Gi", "gpu": 1}, "sweep": {"cpu": "500m", "memory": "1.5Gi"}}
PARSED = {"train": StepResources("4", "8Gi", "20Gi", 1), "sweep": StepResources("500m", "1.5Gi")}


def test_resources_come_from_the_variable_or_from_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("RIDGELINE_STEP_RESOURCES", json.dumps(GIVEN))
    assert Settings().step_resources == PARSED
    file = tmp_path / "resources.json"
    file.write_text(json.dumps(GIVEN))
    monkeypatch.setenv("RIDGELINE_STEP_RESOURCES", str(file))
    assert Settings().step_resources == PARSED
    assert Settings(step_resources=PARSED).step_resources == PARSED
    monkeypatch.setenv("RIDGELINE_STEP_RESOURCES", "")
    assert Settings().step_resources == {}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("[1]", "or a file with one \\(No such file"),
        ('{"train"', "expected a JSON object such as .*; received"),
        ('{"trian": {"cpu": 1, "memory": "1Gi"}}', "some of the steps .*train.*; received trian"),
        ('{"train": {"cpu": 1}}', "cpu, memory and, .*for train; received cpu"),
        ('{"train": {}}', "for train; received none"),
        ('{"train": 4}', "for train; received 4"),
        ('{"train": {"cpu": 1, "memory": "1Gi", "gpus": 1}}', "received cpu, memory, gpus"),
        ('{"train": {"cpu": "four", "memory": "1Gi"}}', "a quantity such as 2 or 500m for train.cpu; .*'four'"),
        ('{"train": {"cpu": 1, "memory": "1 GB"}}', "train.memory; received '1 GB'"),
        ('{"train": {"cpu": 0, "memory": "1Gi"}}', "train.cpu; received 0"),
        ('{"train": {"cpu": "2Gi", "memory": "1Gi"}}', "train.cpu; received '2Gi'"),
        ('{"train": {"cpu": 1, "memory": 8}}', "such as 4Gi or 500M for train.memory; received 8"),
        ('{"train": {"cpu": 1, "memory": "512m"}}', "train.memory; received '512m'"),
        ('{"train": {"cpu": 1, "memory": "1Gi", "disk": "20"}}', "train.disk; received '20'"),
        ('{"train": {"cpu": true, "memory": "1Gi"}}', "train.cpu; received True"),
        ('{"train": {"cpu": 1, "memory": "1Gi", "gpu": "1"}}', "a whole number of GPUs for train; received '1'"),
        ('{"train": {"cpu": 1, "memory": "1Gi", "gpu": -1}}', "received -1"),
    ],
)
def test_what_can_not_be_used_is_refused_with_what_was_expected(monkeypatch, tmp_path, value, message):
    for place in ("", "file"):
        if place and value.startswith("{"):
            (tmp_path / "file").write_text(value)
            value = str(tmp_path / "file")
        monkeypatch.setenv("RIDGELINE_STEP_RESOURCES", value)
        with pytest.raises(SettingsError, match="Setting RIDGELINE_STEP_RESOURCES: expected ") as refused:
            Settings()
        if not place:
            assert refused.match(message)
        elif value.startswith("/"):
            assert str(tmp_path / "file") in str(refused.value)
