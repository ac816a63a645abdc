"""The compose file, checked without a container engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import airflow
import yaml
from airflow.providers.celery.get_provider_info import get_provider_info

ROOT = Path(__file__).resolve().parents[2]
ONE_TIME = {"secrets", "database-files", "database-tables", "object-store-check"}
KEYS = {
    "build", "cap_add", "cap_drop", "command", "cpus", "depends_on", "entrypoint", "environment", "healthcheck",
    "image", "init", "logging", "mem_limit", "ports", "profiles", "read_only", "restart", "scale", "security_opt",
    "stop_grace_period", "tmpfs", "user", "volumes",
}  # fmt: skip

CAPABILITIES = {
    "database-files": ["DAC_OVERRIDE"],
    "database": ["CHOWN", "DAC_OVERRIDE", "FOWNER", "SETGID", "SETUID"],
    "broker": ["CHOWN", "DAC_OVERRIDE", "SETGID", "SETUID"],
}
WRITERS = {
    "secrets": {"artifacts", "logs", "secrets", "service-secrets"},
    "database": {"database"},
    "broker": {"broker"},
    "scheduler": {"artifacts", "logs"},
    "worker": set(),  # nothing that another container sees
    "object-store": {"objects"},
    "serving-sync": {"artifacts"},
    "dag-processor": {"logs"},
    "triggerer": {"logs"},
}
# The one-time service writes it to a file; the second value there is empty.
FROM_THE_USER = {("secrets", "RIDGELINE_NOTIFY"), ("secrets", "RIDGELINE_NOTIFY_FILE")} | {
    ("secrets", name) for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
}


def known_options() -> dict[str, dict[str, Any]]:
    """Airflow's and the Celery provider's options, by section."""
    folder = Path(airflow.__file__).parent / "config_templates"
    sections = yaml.safe_load((folder / "config.yml").read_text()) | get_provider_info()["config"]
    return {section: {name: o or {} for name, o in content["options"].items()} for section, content in sections.items()}


def test_every_service_has_known_keys_limits_logs_and_a_read_only_root(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert set(service) <= KEYS, name
        assert service["mem_limit"], name
        assert service["read_only"] is True, name
        assert service["logging"]["options"]["max-size"], name
        assert service["restart"] == ("no" if name in ONE_TIME else "unless-stopped"), name
        assert (name in ONE_TIME) != ("healthcheck" in service), name
        assert (name in ONE_TIME) != ("cpus" in service), name


def test_services_wait_for_services_that_exist_and_are_healthy(compose: dict[str, Any]) -> None:
    services = compose["services"]
    for name, service in services.items():
        for other, how in service.get("depends_on", {}).items():
            assert other in services, name
            expected = "service_completed_successfully" if other in ONE_TIME else "service_healthy"
            assert how == {"condition": expected}, (name, other)
            assert set(services[other].get("profiles", [])) <= set(service.get("profiles", [])), (name, other)


def test_every_volume_is_declared_and_every_declared_one_used(compose: dict[str, Any]) -> None:
    used = {volume.split(":")[0] for service in compose["services"].values() for volume in service["volumes"]}
    assert used == set(compose["volumes"])


def test_every_path_in_the_image_is_one_that_the_dockerfile_makes(compose: dict[str, Any], dockerfile: str) -> None:
    ours = [s for s in compose["services"].values() if s["image"].startswith("localhost/ridgeline:")]
    assert len(ours) == 9
    for service in ours:
        for path in [word for word in service["command"] if word.startswith("/app/")]:
            assert f"docker/{Path(path).name} " in dockerfile
        for volume in service["volumes"]:
            if (path := volume.removesuffix(":ro").split(":")[-1]) not in ("/data", "/images"):
                assert re.search(rf"install -d .*{path}\b", dockerfile), path


def test_the_scripts_name_the_same_volumes_and_secrets(compose: dict[str, Any], first_start: Any) -> None:
    mounted = dict(volume.split(":")[:2] for volume in compose["services"]["secrets"]["volumes"])
    assert mounted == {name: str(path) for name, path in first_start.VOLUMES.items()}
    text, made = yaml.safe_dump(compose), (ROOT / "docker" / "first_start.py").read_text()
    for name in set(re.findall(r"/(?:service-)?secrets/([\w.]+)", text)):
        assert f'"{name}"' in made, name


def test_every_airflow_option_exists_and_commands_give_secrets_only(compose: dict[str, Any], dockerfile: str) -> None:
    options = known_options()
    names = {name for s in compose["services"].values() for name in s.get("environment", {})}
    names |= set(re.findall(r"AIRFLOW__\w+", dockerfile))
    for name in [name for name in names if name.startswith("AIRFLOW__")]:
        _, section, option = name.lower().split("__")
        if option.endswith("_cmd"):
            assert options[section][option.removesuffix("_cmd")].get("sensitive"), name
        else:
            assert option in options[section], name
            assert not options[section][option].get("sensitive"), name


def test_no_password_stands_in_a_file(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        for variable, value in service.get("environment", {}).items():
            if (
                re.search(r"PASSWORD|SECRET|KEY|TOKEN|NOTIFY(?!_ABOUT)", variable)
                and (name, variable) not in FROM_THE_USER
            ):
                places = ("cat /secrets/", "/secrets/", "/service-secrets/", "/tmp/")
                assert str(value).startswith(places), (name, variable)


def test_a_service_has_no_capability_but_those_that_it_needs(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        assert service["cap_drop"] == ["ALL"], name
        assert service.get("cap_add", []) == CAPABILITIES.get(name, []), name
        assert service["security_opt"] == ["no-new-privileges:true"], name


def test_no_service_can_write_what_it_only_reads(compose: dict[str, Any]) -> None:
    writable = {
        name: {v.split(":")[0] for v in service["volumes"] if not v.endswith(":ro")}
        for name, service in compose["services"].items()
    }
    assert writable == {name: WRITERS.get(name, set()) for name in writable}


def test_the_api_server_logs_users_in_from_a_copy_that_it_may_write(compose: dict[str, Any]) -> None:
    service = compose["services"]["api-server"]
    copy = service["environment"]["AIRFLOW__CORE__SIMPLE_AUTH_MANAGER_PASSWORDS_FILE"]
    assert service["command"][:2] == ["sh", "-c"]
    assert service["command"][2].startswith(f"install -m 0600 /secrets/passwords.json {copy} && exec airflow ")
    assert copy.startswith(service["tmpfs"][0])


def test_no_service_reaches_another_through_a_proxy(compose: dict[str, Any]) -> None:
    for name, service in compose["services"].items():
        if environment := service.get("environment", {}).copy():
            if "NO_PROXY" not in environment:
                assert service["image"].startswith(("postgres:", "localhost/ridgeline-object-store:")), name
                continue
            direct = set(environment["NO_PROXY"].split(","))
            assert set(environment["no_proxy"].split(",")) == direct
            assert {"api-server", "database", "broker", "object-store", "127.0.0.1", "localhost"} <= direct & (
                compose["services"].keys() | {"127.0.0.1", "localhost"}
            )


def test_workers_take_the_queues_that_the_dags_use(compose: dict[str, Any]) -> None:
    command = compose["services"]["worker"]["command"]
    queues = set(command[command.index("--queues") + 1].split(","))
    used = {
        queue
        for path in [*(ROOT / "dags").glob("*.py"), ROOT / "ridgeline" / "airflow" / "pool.py"]
        for queue in re.findall(r'\bqueue"?[:=] ?"(\w+)"', path.read_text())
    }
    assert used | {"default"} == queues


def test_every_variable_has_a_default_and_is_documented(compose_text: str) -> None:
    named = set(re.findall(r"(?<!\$)\$\{(\w+)", compose_text))
    assert named == set(re.findall(r"(?<!\$)\$\{(\w+):-", compose_text))
    documented = (ROOT / "docs" / "server.md").read_text()
    assert sorted(name for name in named if f"`{name}`" not in documented) == []


def test_ports_are_published_on_this_machine_alone_by_default(compose: dict[str, Any]) -> None:
    ports = [port for service in compose["services"].values() for port in service.get("ports", [])]
    assert len(ports) == 2
    assert all(port.startswith("127.0.0.1:") for port in ports)
