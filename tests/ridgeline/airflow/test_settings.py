"""Connections as Airflow itself finds them: in the environment here, in its database in tests/e2e."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from ridgeline import masking, pipeline
from ridgeline.announcements import announce
from ridgeline.decisions import Decision, Decisions
from ridgeline.settings import Settings, SettingsError

pytestmark = [
    pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning"),  # apprise imports it
    pytest.mark.usefixtures("no_secrets"),
]
PUSHED = Decision(
    kind="pushed", model="shoes", subject="version 1", title="shoes: version 1 was pushed", reasons=("-",)
)


@pytest.fixture(scope="module")
def module(tmp_path_factory: pytest.TempPathFactory) -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AIRFLOW_HOME", str(tmp_path_factory.mktemp("airflow")))  # read at Airflow's first import
        import airflow  # noqa: F401

        from ridgeline.airflow import settings
    return settings


def test_no_process_of_airflow_has_settings_that_find_no_connection() -> None:
    folder = Path(pipeline.__file__).parent / "airflow"
    found = [path.name for path in folder.rglob("*.py") if re.search(r"(?<!Airflow)\bSettings\(\)", path.read_text())]
    assert found == []


@pytest.fixture
def no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_known", set())


@pytest.fixture
def hook() -> Iterator[SimpleNamespace]:
    """A webhook: its address, the paths of the messages that it received, and the paths that it refuses."""
    hook = SimpleNamespace(address="", paths=[], refused=())

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            hook.paths.append(self.path)
            self.send_response(500 if self.path in hook.refused else 200)
            self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        hook.address = f"json://ann:hunter22@127.0.0.1:{server.server_port}"
        yield hook
        server.shutdown()


def add(monkeypatch: pytest.MonkeyPatch, name: str, **fields: Any) -> None:
    monkeypatch.setenv(f"AIRFLOW_CONN_{name.upper()}", json.dumps(fields))


def test_each_recipient_of_a_connection_gets_a_message_once(
    module: ModuleType, hook: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ridgeline.messages.Recipient.send.__defaults__", ((),))
    settings = module.AirflowSettings(store=str(tmp_path / "store"), notify="airflow://ops")
    announce(settings, PUSHED)  # the connection is missing
    assert hook.paths == []
    hook.refused = ("/b",)
    add(monkeypatch, "ops", conn_type="apprise", extra={"config": [{"path": f"{hook.address}/{x}"} for x in "ab"]})
    announce(settings, PUSHED)
    assert hook.paths == ["/a", "/b"]
    hook.refused = ()
    announce(settings, PUSHED)
    announce(settings, PUSHED)
    assert hook.paths == ["/a", "/b", "/b"]
    text = "".join(path.read_text() for path in (tmp_path / "store").rglob("*.json"))
    assert "hunter22" not in text
    assert hook.address.partition("@")[2] not in text


def test_a_changed_password_sends_no_message_again(
    module: ModuleType, hook: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = module.AirflowSettings(store=str(tmp_path / "store"), notify="airflow://ops")
    for password in ("hunter22", "hunter23"):
        url = f"{hook.address.replace('hunter22', password)}/a"
        add(monkeypatch, "ops", conn_type="apprise", extra={"config": {"path": url}})
        announce(settings, PUSHED)
    assert hook.paths == ["/a"]


@pytest.mark.parametrize(
    ("fields", "cause"),
    [
        (None, "Airflow has no such connection, or its secrets backend does not respond"),
        ("no://[url", "Airflow has no such connection, or its secrets backend does not respond"),
        ({}, "expected type apprise or smtp; received none"),
        ({"conn_type": "http", "host": "example.org"}, "expected type apprise or smtp; received http"),
        ({"conn_type": "apprise"}, "expected config in its extra"),
        ({"conn_type": "apprise", "extra": {"config": {"path": "foo://hunter22"}}}, "expected an Apprise URL in it"),
    ],
)
def test_a_connection_that_can_t_be_used_is_logged_and_the_other_recipients_get_the_message(
    module: ModuleType,
    hook: SimpleNamespace,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: Any,
    fields: Any,
    cause: str,
) -> None:
    if fields is not None:
        monkeypatch.setenv("AIRFLOW_CONN_OPS", fields if isinstance(fields, str) else json.dumps(fields))
    settings = module.AirflowSettings(store=str(tmp_path / "store"), notify=f"airflow://ops {hook.address}/b")
    announce(settings, PUSHED)
    assert hook.paths == ["/b"]
    prefix = "'shoes: version 1 was pushed': Cannot use the Airflow connection 'ops' in RIDGELINE_NOTIFY"
    assert f"Cannot deliver the message {prefix}: {cause}" in caplog.text
    assert "1 messages wait" in caplog.text
    assert "hunter22" not in caplog.text


def test_the_store_takes_its_credentials_from_a_connection(
    module: ModuleType, bucket: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import s3fs

    endpoint = os.environ["AWS_ENDPOINT_URL"]
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    extra = {"endpoint_url": endpoint, "region_name": "us-east-1"}
    add(monkeypatch, "team_store", conn_type="aws", login="AKIA123", password="hunter22", extra=extra)
    settings = module.AirflowSettings(store=f"{bucket}/store", store_connection="team_store")
    assert Decisions(settings.open_store()).add(PUSHED)
    assert [decision.title for decision in Decisions(settings.open_store()).all()] == [PUSHED.title]
    assert "hunter22" not in repr(settings)
    assert "hunter22" not in repr(settings.open_store().root)
    assert masking.mask("AKIA123 hunter22") == "*** ***"

    s3fs.S3FileSystem.clear_instance_cache()  # those of the environment
    with pytest.raises(Exception, match="credentials"):
        Decisions(Settings(store=f"{bucket}/store").open_store()).all()
    add(monkeypatch, "team_store", conn_type="smtp", password="hunter22")
    with pytest.raises(
        SettingsError, match="'team_store' for the store: expected type aws or generic .* received smtp"
    ):
        module.AirflowSettings(store=f"{bucket}/store", store_connection="team_store").open_store()


def test_a_secrets_backend_that_does_not_respond_fails_no_run(tmp_path: Path) -> None:
    (tmp_path / "vault.py").write_text(
        "from airflow.secrets import BaseSecretsBackend\n"
        "class Vault(BaseSecretsBackend):\n"
        "    def get_connection(self, conn_id, **_):\n"
        "        raise ConnectionRefusedError('no login with hunter22')\n"
    )
    program = """
from ridgeline.airflow.settings import AirflowSettings
for recipient in AirflowSettings(notify="airflow://ops").recipients:
    recipient.send("title", "body")
try:
    AirflowSettings(store="s3://bucket/store", store_connection="ops").open_store()
except ValueError as error:
    print(error)
"""
    env = {**os.environ, "AIRFLOW_HOME": str(tmp_path), "AIRFLOW__SECRETS__BACKEND": "vault.Vault"}
    env |= {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "PYTHONWARNINGS": "ignore"}
    done = subprocess.run([sys.executable, "-P", "-c", program], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    cause = "Airflow has no such connection, or its secrets backend does not respond"
    assert (
        f"Cannot deliver the message 'title': Cannot use the Airflow connection 'ops' in RIDGELINE_NOTIFY: {cause}"
        in done.stdout
    )
    assert f"Cannot use the Airflow connection 'ops' for the store: {cause}" in done.stdout
    assert "hunter22" not in done.stdout + done.stderr
