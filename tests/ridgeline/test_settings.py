import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from ridgeline.component import ParameterError
from ridgeline.masking import mask
from ridgeline.settings import Settings, SettingsError
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


@pytest.mark.parametrize("name", ["STORE", "SERVING"])
@pytest.mark.parametrize("url", ["s3://", "s3:///models"])
def test_a_url_without_a_bucket_is_refused(monkeypatch, name, url):
    monkeypatch.setenv(f"RIDGELINE_{name}", url)
    with pytest.raises(SettingsError, match=f"RIDGELINE_{name}: expected the name of a bucket after s3://; received"):
        Settings()


def test_remote_store_needs_a_serving_folder():
    with pytest.raises(StoreError, match="RIDGELINE_SERVING"):
        Settings(store="memory://bucket").serving_dir()


@pytest.mark.parametrize("character", ["*", "?", "[v1]", "\\"])
def test_a_folder_from_which_tensorflow_cannot_load_is_refused_before_work(tmp_path, character):
    from ridgeline.pipeline import parse_params, plan

    store = str(tmp_path / f"data{character}" / "store")
    with pytest.raises(ParameterError, match="a pattern; received .*Name another folder in RIDGELINE_SERVING."):
        parse_params(plan("export"), {}, Settings(store=store))
    elsewhere = str(tmp_path / "serving")
    parse_params(plan("export"), {}, Settings(store=store, serving=elsewhere))
    parse_params(plan("train"), {}, Settings(store=store))  # nothing is served
    with pytest.raises(ParameterError, match="Name another folder in RIDGELINE_SERVING_BASE_PATH."):
        parse_params(plan("export"), {}, Settings(serving=elsewhere, serving_base_path=f"/models{character}"))
    assert list(tmp_path.iterdir()) == []


def test_a_remote_store_without_a_folder_for_served_models_is_refused_before_work():
    from ridgeline.pipeline import parse_params, plan

    with pytest.raises(ParameterError, match="Set RIDGELINE_SERVING"):
        parse_params(plan("export"), {}, Settings(store="memory://bucket"))


# --- bad values

BAD = {
    "store": ["foo://bucket/store", "~no_such_user/store", "a" * 300, "\udc80"],
    "store_connection": ["team_store"],  # the store is a folder
    "cache_gib": ["abc", "0", "-1", "nan"],
    "serving": ["gs://bucket/serving", "~no_such_user/serving"],
    "serving_base_path": [],  # any text: it is a path or URL on another machine
    "keep_versions": ["abc", "0", "2.5", "[]"],
    "manual_dir": ["https://example.org/data", "~no_such_user/data"],
    "image_dir": ["nosuch://bucket/images", "~no_such_user/images"],
    "beam_pipeline_options": ["DirectRunner", "--runner DirectRunner", "--name='a"],
    "replay_dir": ["nosuch://bucket/images", "~no_such_user/images"],
    "schedule": ["weekly", "* * * *", "61 * * * *", "0 0 30 2 *", "@never", "{}"],
    "inference_schedule": ["weekly", "push", "* * * *"],
    "still_seconds": ["0", "nan", "100000", "a minute"],
    "defaults": ["[1", "[1]", "1", '"text"', "train.epochs=3"],
    "deadline_minutes": ["inf", "-inf", "nan", "0", "1e300", "soon"],
    "notify": ["foo://token", "hunter2", "jsons://example.org mailto://", "://", "airflow://", "airflow://mail?cc=x"],
    "notify_file": ["/nowhere", "/"],
    "notify_about": ["everything", "pushed, refused"],
    "stale_days": ["0", "a month"],
    "refused_in_a_row": ["0", "few"],
    "approvers": ["ann,bob", "ann; bob"],
    "approval_hours": ["0", "-1", "a day", "inf", "73"],
    "tensorflow_slots": ["0", "two", "99999999999999999999"],
    "step_resources": [
        "[1]",
        "/missing.json",
        '{"train": {"cpu": 1}}',
        '{"train": 1}',
        '{"trian": {"cpu": 1, "memory": "1Gi"}}',
    ],
    "maintenance_schedule": ["daily", "0 6 * * 8"],
    "keep_runs": ["-1", "all"],
    "log_retention_days": ["0", "999999999", "1 week"],
    "metadata_retention_days": ["4", "999999999", "ninety"],
}


def test_every_setting_has_bad_values_to_test_with():
    assert BAD.keys() == Settings.model_fields.keys()


@pytest.mark.parametrize(("field", "value"), [(field, value) for field, values in BAD.items() for value in values])
def test_a_bad_value_is_refused_in_one_line_when_settings_are_read(monkeypatch, capfd, field, value):
    name = f"RIDGELINE_{field.upper()}"
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsError) as caught:
        Settings()
    message = str(caught.value)
    assert message.startswith(f"Setting {name}: expected ")
    assert "; received " in message
    assert message.endswith(". Correct or unset the environment variable.")
    assert "\n" not in message
    assert capfd.readouterr() == ("", "")  # no library prints the value


@pytest.mark.parametrize("option", ["--s3_secret_access_key=hunter2hunter2", "--s3_session_token='hunter2hunter2'"])
def test_secrets_among_options_of_beam_are_in_no_message(monkeypatch, option):
    name = "RIDGELINE_BEAM_PIPELINE_OPTIONS"
    for bad in (option.replace("=", " "), f"{option} 'x"):
        monkeypatch.setenv(name, bad)
        with pytest.raises(SettingsError) as caught:
            Settings()
        assert "hunter2" not in str(caught.value)
    monkeypatch.setenv(name, option)
    assert "hunter2hunter2" in "".join(Settings().beam_pipeline_options or ())
    assert mask(f"{name}='{option}'").count("hunter2") == 0


def test_a_connection_can_be_looked_up_in_airflow_alone(monkeypatch, caplog):
    settings = Settings(
        store="s3://bucket/store", store_connection="team_store", notify="airflow://ops json://127.0.0.1"
    )
    with pytest.raises(
        SettingsError, match="Cannot use the Airflow connection 'team_store' for the store: only Airflow"
    ):
        settings.open_store()
    connection, webhook = settings.recipients
    assert webhook.url == "json://127.0.0.1"
    assert not connection.send("shoes: version 1 was pushed", "", waits_seconds=())
    assert "pushed': Cannot use the Airflow connection 'ops' in RIDGELINE_NOTIFY: only Airflow can look" in caplog.text


def test_a_connection_of_the_file_of_recipients_is_named_with_its_file(tmp_path, caplog):
    (tmp_path / "notify").write_text("airflow://ops")
    (connection,) = Settings(notify_file=tmp_path / "notify").recipients
    assert not connection.send("title", "", waits_seconds=())
    assert f"Cannot use the Airflow connection 'ops' in the file {tmp_path}/notify: only Airflow can" in caplog.text


class Connected(Settings):
    """Settings whose every connection is of type `generic`."""

    extra: dict[str, Any]

    def look_up(self, conn_id):
        fields = {"conn_type": "generic", "host": None, "port": None, "login": None, "password": None}
        return SimpleNamespace(**fields, extra=json.dumps(self.extra))


@pytest.mark.parametrize(
    ("store", "extra", "cause"),
    [
        ("s3://bucket/store", {"nonsense": "hunter22"}, "TypeError"),
        ("s3://bucket/store", {"client_kwargs": "hunter22"}, "AttributeError"),
        ("s3://bucket/store", {"client_kwargs": {"hunter22": 1}}, "TypeError"),
        ("s3://bucket/store", {"config_kwargs": {"hunter22": 1}}, "TypeError"),
        ("s3://bucket/store", {"profile": "hunter22"}, "ProfileNotFound"),
        ("s3://bucket/store", {"protocol": "hunter22"}, "ValueError"),
    ],
)
def test_options_that_the_driver_refuses_are_refused_with_the_name_of_the_connection(tmp_path, store, extra, cause):
    with pytest.raises(SettingsError) as caught:
        Connected(store=store, store_connection="team", extra=extra).open_store()
    assert str(caught.value).startswith(
        f"Cannot use the Airflow connection 'team' for the store: the driver refuses its options ({cause}). Correct it"
    )
    assert "hunter22" not in str(caught.value)


def test_a_driver_that_is_not_installed_is_no_fault_of_the_connection():
    with pytest.raises(StoreError, match="Install adlfs"):
        Connected(store="abfs://bucket/store", store_connection="team", extra={"account_name": "a"}).open_store()


def test_all_bad_values_are_named_in_one_line(monkeypatch):
    for field, values in BAD.items():
        if values:
            monkeypatch.setenv(f"RIDGELINE_{field.upper()}", values[0])
    with pytest.raises(SettingsError) as caught:
        Settings()
    named = [word for word in str(caught.value).split() if word.startswith("RIDGELINE_")]
    expected = [f"RIDGELINE_{field.upper()}:" for field, values in BAD.items() if values]
    assert named == [name for name in expected if name != "RIDGELINE_STORE_CONNECTION:"]  # of a good store alone
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("store", "s3://user:hunter22@bucket/store?token=hunter22"),
        ("store", "foo://user:hunter22@bucket"),
        ("serving", "s3://user:p@ss/hunter22@bucket"),
        ("notify", "foo://hunter22/hunter22@x"),
        ("notify", "hunter22"),
        ("notify", "slack://hunter22"),
    ],
)
def test_a_message_about_a_setting_shows_no_secret(monkeypatch, field, value):
    monkeypatch.setenv("RIDGELINE_KEEP_VERSIONS", "abc")
    monkeypatch.setenv(f"RIDGELINE_{field.upper()}", value)
    with pytest.raises(SettingsError) as caught:
        Settings()
    assert "hunter22" not in str(caught.value)


@pytest.mark.parametrize("schedule", ["never", "@weekly", "@quarterly", "30 4 * * 1-5"])
def test_schedules_that_airflow_reads_are_accepted(monkeypatch, schedule):
    monkeypatch.setenv("RIDGELINE_SCHEDULE", schedule)
    monkeypatch.setenv("RIDGELINE_INFERENCE_SCHEDULE", schedule)
    assert (Settings().schedule, Settings().inference_schedule) == (schedule, schedule)
    monkeypatch.setenv("RIDGELINE_INFERENCE_SCHEDULE", "pushed")
    assert Settings().inference_schedule == "pushed"


def test_recipients_come_from_the_variable_and_from_a_file(monkeypatch, tmp_path):
    (tmp_path / "notify").write_text("mailto://user:password@example.org\njsons://example.org/a\n")
    monkeypatch.setenv("RIDGELINE_NOTIFY", "json://example.org/b")
    monkeypatch.setenv("RIDGELINE_NOTIFY_FILE", str(tmp_path / "notify"))
    assert [recipient.url for recipient in Settings().recipients] == [
        "json://example.org/b",
        "mailto://user:password@example.org",
        "jsons://example.org/a",
    ]
    (tmp_path / "notify").write_text("mailto://user:password@example.org foo://")
    with pytest.raises(SettingsError, match=r"RIDGELINE_NOTIFY_FILE: expected Apprise URLs.*received foo://\*\*\*\."):
        Settings()
