"""What becomes of the fields of an Airflow connection; tests/ridgeline/airflow/test_settings.py has Airflow's own."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pytest

from ridgeline import masking
from ridgeline.connections import apprise_urls, hide_secrets, storage_options


@dataclass
class Fields:
    """The fields of a connection."""

    conn_type: str | None = None
    host: str | None = None
    port: int | None = None
    login: str | None = None
    password: str | None = None
    extra: str | None = None


def with_extra(conn_type: str, **extra: Any) -> Fields:
    return Fields(conn_type, extra=json.dumps(extra))


HOOK, MAIL = "jsons://ann:hunter22@example.org/a/b?x=y", "mailto://ann:hunter22@example.org"


@pytest.mark.parametrize(
    ("config", "urls"),
    [
        ({"path": HOOK, "tag": "alerts"}, [HOOK]),
        (json.dumps({"path": HOOK}), [HOOK]),  # as Airflow's form stores it
        ([{"path": HOOK}, {"path": MAIL, "tag": "mail"}], [HOOK, MAIL]),
    ],
)
def test_a_connection_of_type_apprise_holds_urls(config: Any, urls: list[str]) -> None:
    assert apprise_urls(with_extra("apprise", config=config)) == urls


@pytest.mark.parametrize("config", [None, "", "jsons://example.org", [], {}, {"path": ""}, [{"path": HOOK}, {}], 5])
def test_another_config_is_refused_without_its_text(config: Any) -> None:
    with pytest.raises(ValueError, match="expected config in its extra") as caught:
        apprise_urls(with_extra("apprise", config=config))
    assert "example.org" not in str(caught.value)


@pytest.mark.parametrize(
    ("extra", "port", "url"),
    [
        ({}, None, "mailtos://ann%40example.org:p%40ss%2Fw@mail.example.org:465?smtp=mail.example.org&{}&mode=ssl"),
        ({"disable_ssl": True}, 587, "mailtos://ann%40example.org:p%40ss%2Fw@mail.example.org:587?smtp=mail.example.org&{}&mode=starttls"),
        ({"disable_ssl": True, "disable_tls": True}, 25, "mailto://ann%40example.org:p%40ss%2Fw@mail.example.org:25?smtp=mail.example.org&{}&mode=insecure"),
    ],
)  # fmt: skip
def test_a_connection_of_type_smtp_names_the_server_and_the_sender(
    extra: dict[str, Any], port: int | None, url: str
) -> None:
    fields = Fields("smtp", "mail.example.org", port, "ann@example.org", "p@ss/w", json.dumps(extra))
    expected = url.format("from=ann@example.org&to=bob@example.org,eve@example.org")
    assert apprise_urls(fields, "bob@example.org,eve@example.org") == [expected]


@pytest.mark.parametrize(
    ("fields", "to", "problem"),
    [
        (Fields("smtp", login="a@b.org"), "bob@example.org", "needs a host"),
        (Fields("smtp", "host", login="a@b.org"), "", "needs [?]to=ADDRESS"),
        (Fields("smtp", "host", login="ann"), "bob@example.org", "needs from_email"),
        (Fields("smtp", "host", login="a@b.org", extra='{"auth_type": "oauth2"}'), "b@c.org", "auth_type basic"),
        (Fields("smtp", "host", extra="[1]"), "b@c.org", "not a JSON object"),
        (Fields("smtp", "host", extra="{"), "b@c.org", "not a JSON object"),
        (with_extra("apprise", config={"path": HOOK}), "b@c.org", "[?]to= is for connections of type smtp"),
        (Fields("http", "example.org"), "", "expected type apprise or smtp; received http"),
        (Fields(), "", "expected type apprise or smtp; received none"),
    ],
)
def test_a_connection_that_names_no_recipient_is_refused(fields: Fields, to: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        apprise_urls(fields, to)


def test_a_connection_of_type_aws_holds_the_options_of_s3() -> None:
    fields = with_extra("aws", region_name="eu-west-1", endpoint_url="http://minio:9000", aws_session_token="session")
    fields.login, fields.password = "AKIA", "hunter22"
    assert storage_options(fields, "s3") == {
        "key": "AKIA",
        "secret": "hunter22",
        "token": "session",
        "endpoint_url": "http://minio:9000",
        "client_kwargs": {"region_name": "eu-west-1"},
    }
    fields = with_extra("aws", aws_access_key_id="AKIA", aws_secret_access_key="hunter22")
    assert storage_options(fields, "s3a") == {"key": "AKIA", "secret": "hunter22"}
    assert storage_options(Fields("aws"), "s3") == {}  # as in Airflow: the driver finds its credentials


def test_a_connection_of_type_generic_holds_the_options_of_any_driver() -> None:
    assert storage_options(with_extra("generic", account_name="a", account_key="k"), "abfs") == {
        "account_name": "a",
        "account_key": "k",
    }
    assert storage_options(with_extra("generic", profile="team"), "s3") == {"profile": "team"}


@pytest.mark.parametrize(
    ("fields", "protocol", "problem"),
    [
        (
            with_extra("aws", role_arn="arn:1", verify=False),
            "s3",
            "received role_arn, verify. Use a connection of type g",
        ),
        (Fields("aws", login="AKIA"), "s3", "an access key id and its secret; received one"),
        (Fields("aws", password="hunter22"), "s3", "an access key id and its secret; received one"),
        (Fields("aws", extra="x"), "s3", "not a JSON object"),
        (Fields("aws"), "gs", "expected type generic for gs:// URLs; received aws"),
        (Fields("smtp"), "s3", "expected type aws or generic for s3:// URLs; received smtp"),
        (Fields("generic"), "gs", "needs the driver's options"),
        (Fields("generic", login="ann", extra='{"token": "x"}'), "gs", "no login or password"),
    ],
)
def test_a_connection_without_usable_options_is_refused(fields: Fields, protocol: str, problem: str) -> None:
    with pytest.raises(ValueError, match=problem) as caught:
        storage_options(fields, protocol)
    assert "hunter22" not in str(caught.value)


def test_the_secrets_of_a_connection_are_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(masking, "_known", set())
    hide_secrets(Fields("smtp", "mail.example.org", 25, "postmaster", "hunter22"))
    hide_secrets(Fields("aws", None, None, "AKIA1", "hunter23", json.dumps({"region_name": "eu-west-1"})))
    hide_secrets(with_extra("generic", options={"account_key": ["k3y-value"], "endpoint_url": "http://minio:9000"}))
    hide_secrets(with_extra("apprise", config=json.dumps({"path": "slack://T0ken/A/B"})))
    hide_secrets(Fields("apprise", extra="slack://T1ken/C/D"))
    secrets = ["hunter22", "AKIA1", "hunter23", "k3y-value", "T0ken/A/B", "slack://T1ken/C/D"]
    shown = ["postmaster", "mail.example.org", "eu-west-1", "minio:9000"]
    text = masking.mask(f"{secrets} {shown}")
    assert [secret for secret in secrets if secret in text] == []
    assert [word for word in shown if word not in text] == []


@pytest.mark.parametrize(
    ("extra", "shown", "hidden"),
    [
        ({"auth_type": "basic"}, "a basic network", ""),
        ({"authMethod": "plain", "auth": {"type": "login"}}, "a plain login", ""),
        ({"token_timeout": 86400, "private_key_path": "/etc/keys"}, "86400 files in /etc/keys", ""),
        ({"token": "cache"}, "a cached step", ""),
        ({"anon": True, "use_token": True}, "True", ""),
        ({"token": 1234567890}, "", "1234567890"),
        ({"config": {"api_keys": [1234567890, "basic-key"]}}, "a basic network", "1234567890 basic-key"),
        (
            {"token": json.dumps({"type": "service_account", "private_key": "pk-value"})},
            "a service_account",
            "pk-value",
        ),
        ({"auth": "letmein", "port": 54321}, "port 54321", "letmein"),
    ],
)
def test_what_only_describes_a_secret_is_shown_and_numbers_can_be_secrets(
    monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], shown: str, hidden: str
) -> None:
    monkeypatch.setattr(masking, "_known", set())
    hide_secrets(with_extra("generic", **extra))
    assert masking.mask(shown) == shown
    assert masking.mask(hidden) == " ".join("***" for _ in hidden.split())
