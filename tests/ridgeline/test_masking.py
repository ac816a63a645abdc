"""No secret of a URL reaches a text that people see: errors, logs, records, pages, XCom, the resume command."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from typer.testing import CliRunner

from ridgeline import cli, masking
from ridgeline.artifacts.base import ArtifactError
from ridgeline.executor import execute
from ridgeline.masking import mask, remember
from ridgeline.settings import Settings
from ridgeline.store import Store, StoreError

PASSWORD, TOKEN = "hunter22@/x:y", "t0k3n-value"
URL = f"memory://ann:{PASSWORD}@bucket/store?token={TOKEN}"
SECRETS = (PASSWORD, "hunter22", TOKEN)


@pytest.fixture(autouse=True)
def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_known", set())


def assert_hidden(*texts: str) -> None:
    for text in texts:
        assert not [secret for secret in SECRETS if secret in text], text


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bucket/store", "s3://bucket/store"),
        ("s3://ann:hunter22@bucket/store", "s3://***@bucket/store"),
        ("s3://ann:hunter22@/@x@bucket/store", "s3://***@bucket/store"),
        ("s3://ann:p?hunter22=t0k3n-value@bucket", "s3://***@bucket"),
        ("https://t0k3n-value@example.org/x", "https://***@example.org/x"),
        ("https://b.org/x?token=t0k3n-value&sig=hunter22#key=hunter22", "https://b.org/x?token=***&sig=***#key=***"),
        ("https://example.org?mail=ann@b.org&token=t0k3n-value", "https://***@b.org&token=***"),
        ("received 's3://ann:hunter22@bucket'; try (again).", "received 's3://***@bucket'; try (again)."),
        ("received 's3://bucket?token=t0k3n-value'.", "received 's3://bucket?token=***'."),
        ("a s3://u:hunter22@b and jsons://v:t0k3n-value@c", "a s3://***@b and jsons://***@c"),
        ("simplecache::s3://ann:hunter22@bucket", "simplecache::s3://***@bucket"),
        ("s3://bucket/models@2026/x", "s3://bucket/models@2026/x"),
        ("ann@example.org a=b?c=d /data/x@y", "ann@example.org a=b?c=d /data/x@y"),
    ],
)
def test_the_secrets_of_urls_are_hidden_and_nothing_else(text: str, expected: str) -> None:
    assert mask(text) == expected
    assert mask(mask(text)) == mask(text)


def test_a_name_without_a_password_is_hidden_in_its_url_alone() -> None:
    remember("sftp://airflow@host/store")
    assert mask("airflow reads sftp://airflow@host/store") == "airflow reads sftp://***@host/store"


def test_the_recipients_in_a_file_are_remembered(tmp_path: Path) -> None:
    (tmp_path / "notify").write_text("json://ann:hunter22@example.org/x")
    Settings(notify_file=tmp_path / "notify")
    assert_hidden(mask("refused: hunter22"))


def test_a_wrong_command_line_shows_no_secret_and_no_traceback() -> None:
    result = CliRunner().invoke(cli.app, ["lineage", "a", URL])
    assert result.exit_code == 2
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert_hidden(result.stderr)


def test_a_remembered_secret_is_hidden_outside_of_its_url_also_decoded() -> None:
    remember("s3://ann:hunter%3222@bucket?token=t0k3n-value")
    assert mask("No file /ann:hunter%3222@bucket; hunter222, hunter%3222, t0k3n-value") == (
        "No file /***@bucket; ***, ***, ***"
    )


def test_short_secrets_are_hidden_inside_urls_alone() -> None:
    remember("s3://a:b@c?d=e")
    assert mask("a b e s3://a:b@c?d=e") == "a b e s3://***@c?d=***"


# --- a store whose URL has a password


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    fsspec.filesystem("memory").store.clear()
    yield Store(URL, mirror=tmp_path / "mirror")
    fsspec.filesystem("memory").store.clear()


def errors_of(store: Store) -> Iterator[Exception]:
    """Yield the error of each reader and writer of a store without the artifact."""
    ref = f"Number/{'0' * 64}"
    for call in (store.manifest, store.fetch, store.find):
        with pytest.raises(ArtifactError) as caught:
            call(ref)
        yield caught.value


def test_errors_of_a_store_name_its_place_and_hide_its_secrets(store: Store) -> None:
    found = [str(error) for error in errors_of(store)]
    with pytest.raises(StoreError) as refused:
        Settings(store=URL).serving_dir()
    found.append(str(refused.value))
    assert_hidden(*found)
    assert all("***@bucket/store" in text for text in found)


def test_records_logs_and_commands_of_a_failing_run_hide_them(
    store: Store, toy_steps: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    seed = importlib.import_module("toy_steps.seed").seed
    with caplog.at_level("DEBUG", logger="ridgeline"):
        first = execute(store, seed, {}, seed.parse({}), "run")
        assert first.output
        store.delete(first.output)
        execute(store, seed, {}, seed.parse({}), "run")  # artifact missing or damaged: ... at the URL
        path = next(iter((store.root / "executions" / "seed").glob("*/*")))
        path.write_text("damaged")
        list(store.executions())  # warns that it was left out

    def fail(**_: Any) -> Any:
        raise OSError(f"Cannot reach {URL}: login of ann with {PASSWORD} refused")

    monkeypatch.setattr(type(seed), "__call__", lambda *_, **given: fail(**given))
    with caplog.at_level("DEBUG", logger="ridgeline"), pytest.raises(OSError, match="refused"):
        execute(store, seed, {}, seed.parse({"value": 3}), "run")
    reasons = [record.reason for record in store.executions("seed")]
    assert any("login of ann with *** refused" in reason for reason in reasons)
    written = [file.read_text() for file in (store.root / "executions" / "seed").glob("*/*")]
    assert_hidden(caplog.text, *reasons, *written)


@pytest.mark.parametrize("unexpected", [False, True])
def test_the_command_line_hides_them(
    store: Store, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, unexpected: bool
) -> None:
    monkeypatch.setenv("RIDGELINE_STORE", URL)
    monkeypatch.setenv("RIDGELINE_SERVING", str(tmp_path / "serving"))
    monkeypatch.setattr(Path, "home", lambda: tmp_path)

    def fail(*_: Any, **__: Any) -> Any:
        try:
            raise KeyError(f"{URL} or {TOKEN}")
        except KeyError as error:
            raise (LookupError("no such key") if unexpected else StoreError(f"no key in {URL}")) from error

    monkeypatch.setattr(cli, "collect_garbage", fail)
    for command in (["gc"], ["show", "Model"], ["lineage", "Model/0"]):
        result = CliRunner().invoke(cli.app, command)
        assert result.exit_code == 1
        assert "***@bucket/store" in result.output
        assert_hidden(result.output)


def test_settings_remember_their_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RIDGELINE_STORE", URL)
    monkeypatch.setenv("RIDGELINE_NOTIFY", "jsons://bob:s3cr3t@example.org/hook")
    Settings()
    assert mask(f"{PASSWORD} {TOKEN} s3cr3t") == "*** *** ***"
