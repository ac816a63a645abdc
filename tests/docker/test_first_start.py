"""The preparation of the stack, without a container."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography.fernet import Fernet

from ridgeline.airflow.server import environment
from tests.faulty_proxy import Faults

ROOT = Path(__file__).resolve().parents[2]
DATABASE = """
import json, os, sys
sys.path.insert(0, "docker")
from first_start import Refusal, prepare_database
from airflow.models.pool import Pool
from airflow.models.variable import Variable
from airflow.utils.session import create_session
from sqlalchemy import text

def revision(value):
    with create_session() as session:
        session.execute(text("update alembic_version set version_num = :value"), {"value": value})

def attempt(migrate=False):
    try:
        prepare_database(migrate)
    except Refusal as error:
        return str(error)
    return "ready"

def slots():
    return Pool.get_pool("tensorflow").slots

found = {"empty": attempt()}
pool = [slots()]
Pool.create_or_update_pool("tensorflow", slots=7, description="", include_deferred=False)
found["current"] = attempt()
pool.append(slots())
with create_session() as session:
    head = session.scalar(text("select version_num from alembic_version"))
revision("1d6611b6ab7c")
found["older"] = attempt()
revision("ffffffffffff")
found["newer"] = attempt()
revision(head)
Variable.set("secret", "value")
found["same key"] = attempt()
os.environ["AIRFLOW__CORE__FERNET_KEY"] = sys.argv[1]
from airflow.models import crypto
crypto.get_fernet.cache_clear()
found["other key"] = attempt()
print("\\n" + json.dumps([found, pool]))
"""


def test_secrets_are_made_once_and_only_for_their_readers(tmp_path: Path, first_start: Any) -> None:
    private, services = tmp_path / "secrets", tmp_path / "service-secrets"
    private.mkdir(0o777)
    services.mkdir()
    first_start.make_secrets(private, services, "admin:admin")
    files = {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()}
    assert stat.S_IMODE(private.stat().st_mode) == 0o700
    modes = {path.name: oct(stat.S_IMODE(path.stat().st_mode)) for path in files}
    assert modes == {
        "database_password": "0o444",
        "redis.conf": "0o444",
        "object_store": "0o444",
        "aws_credentials": "0o400",
        "database_url": "0o400",
        "broker_url": "0o400",
        "fernet_key": "0o400",
        "jwt_secret": "0o400",
        "api_secret_key": "0o400",
        "notify": "0o400",
        "passwords.json": "0o600",
    }
    Fernet(files[private / "fernet_key"])
    assert files[services / "database_password"] in files[private / "database_url"]
    first_start.make_secrets(private, services, "admin:admin")
    assert {path: path.read_text() for path in tmp_path.rglob("*") if path.is_file()} == files


def test_the_credentials_of_an_object_store_follow_the_settings(tmp_path: Path, first_start: Any) -> None:
    path = tmp_path / "aws_credentials"
    first_start.make_secrets(tmp_path, tmp_path, "admin:admin")
    own = path.read_text()
    for key in (tmp_path / "object_store").read_text().split():
        assert f" = {key}\n" in own
    aws = {"AWS_ACCESS_KEY_ID": "theirs", "AWS_SECRET_ACCESS_KEY": "secret", "AWS_SESSION_TOKEN": ""}
    first_start.make_secrets(tmp_path, tmp_path, "admin:admin", aws=aws)
    assert path.read_text() == "[default]\naws_access_key_id = theirs\naws_secret_access_key = secret\n"
    first_start.make_secrets(tmp_path, tmp_path, "admin:admin", aws=dict.fromkeys(aws, ""))
    assert path.read_text() == "[default]\n"  # the driver takes the machine's role, for example
    first_start.make_secrets(tmp_path, tmp_path, "admin:admin")
    assert path.read_text() == own


@pytest.mark.parametrize(
    ("faults", "expected"),
    [
        ({"unconditional": True}, "received s3://.*: it ignores the condition If-None-Match. Two workers would"),
        ({"forbidden": ("DELETE", "POST")}, "AccessDenied. Correct the credentials, or grant .* then run `make up`"),
        ({"forbidden": ("GET", "HEAD", "PUT")}, "AccessDenied. Correct the credentials"),
    ],
)
def test_an_object_store_that_workers_cannot_share_is_refused(
    bucket: str, proxy: Any, first_start: Any, faults: dict[str, Any], expected: str
) -> None:
    first_start.check_store(f"{bucket}/store", "", create_bucket=False)
    proxy.faults = Faults(**faults)
    with pytest.raises(first_start.Refusal, match=expected):
        first_start.check_store(f"{bucket}/store", "", create_bucket=False)


@pytest.mark.parametrize("name", ["RIDGELINE_STORE", "RIDGELINE_SERVING"])
def test_a_folder_that_workers_do_not_share_is_refused(
    name: str, first_start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for other in ("RIDGELINE_STORE", "RIDGELINE_SERVING"):
        monkeypatch.setenv(other, "ftp://ann:secret@host/x" if other == name else "s3://bucket/x")
    with pytest.raises(
        SystemExit, match=f"Expected an s3:// URL as {name} for the profile celery; received 'ftp"
    ) as end:
        first_start.main("store")
    assert "secret" not in str(end.value)


def test_a_missing_bucket_is_refused_and_the_own_bucket_is_made(bucket: str, first_start: Any) -> None:
    with pytest.raises(first_start.Refusal, match="Create the bucket, or correct its name"):
        first_start.check_store(f"{bucket}0/store", "", create_bucket=False)
    for _ in range(2):
        first_start.check_store(f"{bucket}0/store", "", create_bucket=True)
    first_start.check_store(f"{bucket}1/store", "aws", create_bucket=False)  # its credentials are in Airflow


def test_secrets_are_flushed_before_they_appear_and_their_names_afterwards(
    tmp_path: Path, first_start: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    rename = os.rename

    def record_rename(source: Path, target: Path) -> None:
        rename(source, target)
        calls.append(Path(target))

    monkeypatch.setattr(os, "fsync", lambda descriptor: calls.append(os.fstat(descriptor).st_ino))
    monkeypatch.setattr(os, "rename", record_rename)
    first_start.make_secrets(tmp_path, tmp_path, "admin:admin")
    assert len([call for call in calls if isinstance(call, Path)]) == 11
    for i, call in enumerate(calls):
        if isinstance(call, Path):
            assert (calls[i - 1], calls[i + 1]) == (call.stat().st_ino, tmp_path.stat().st_ino)


def test_the_recipients_of_messages_follow_the_setting(tmp_path: Path, first_start: Any) -> None:
    for notify in ("mailto://user:password@example.org", ""):
        first_start.make_secrets(tmp_path, tmp_path, "admin:admin", notify)
        assert (tmp_path / "notify").read_text() == notify
        assert stat.S_IMODE((tmp_path / "notify").stat().st_mode) == 0o400


def test_a_user_that_is_added_gets_a_password_and_the_others_keep_theirs(tmp_path: Path, first_start: Any) -> None:
    first_start.make_secrets(tmp_path, tmp_path, "admin:admin")
    before = json.loads((tmp_path / "passwords.json").read_text())
    first_start.make_secrets(tmp_path, tmp_path, "admin:admin, eve:viewer")
    after = json.loads((tmp_path / "passwords.json").read_text())
    assert after.keys() == {"admin", "eve"}
    assert after["admin"] == before["admin"]


def test_a_volume_that_cannot_be_written_is_refused_with_advice(tmp_path: Path, first_start: Any) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(first_start.Refusal, match=r"Cannot write to the volume 'logs', .*chown -R .*make up"):
        first_start.check_volumes({"artifacts": tmp_path, "logs": tmp_path / "file"})
    assert not list(tmp_path.glob(".probe-*"))


def test_a_bad_setting_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch, first_start: Any) -> None:
    monkeypatch.setenv("RIDGELINE_NOTIFY", "foo://hunter22")
    with pytest.raises(SystemExit, match=r"error: Setting RIDGELINE_NOTIFY: expected .*; received foo://\*\*\*\."):
        first_start.main("secrets")


def test_tf_serving_finds_a_configuration_before_the_first_push(tmp_path: Path, first_start: Any) -> None:
    first_start.prepare_serving(tmp_path / "serving")
    config = tmp_path / "serving" / "models.config"
    assert config.read_text().startswith("model_config_list {")
    config.write_text("pushed")
    first_start.prepare_serving(tmp_path / "serving")
    assert config.read_text() == "pushed"


@pytest.mark.airflow
def test_only_a_matching_database_is_used_and_its_pool_is_created_once(tmp_path: Path) -> None:
    env = environment(tmp_path, "airflow", os.environ) | {"AIRFLOW__CORE__FERNET_KEY": Fernet.generate_key().decode()}
    env["RIDGELINE_TENSORFLOW_SLOTS"] = "3"
    command = [sys.executable, "-c", DATABASE, Fernet.generate_key().decode()]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found, pool = json.loads(done.stdout.splitlines()[-1])
    assert pool == [3, 7], "the size that a user set is kept"
    assert [name for name, outcome in found.items() if outcome == "ready"] == ["empty", "current", "same key"]
    assert "received one of 3.2.0" in found["older"]
    assert "make up MIGRATE=1" in found["older"]
    assert "of a newer Airflow. Start" in found["newer"]
    assert "Restore the volume 'secrets'" in found["other key"]
