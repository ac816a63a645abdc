"""The values for Airflow's Helm chart, and the pods that Airflow's executor makes with them; nothing starts a pod."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from ridgeline.airflow.server import environment
from ridgeline.settings import Settings

ROOT = Path(__file__).resolve().parents[2]
PLACE = ROOT / "docker" / "kubernetes" / "values.yaml"
# As the chart's values.schema.json and values.yaml for Airflow 3.0.5 have them; * is any name.
CHART = """
airflowLocalSettings airflowVersion apiSecretKeySecretName apiServer.args apiServer.env
apiServer.extraVolumeMounts apiServer.extraVolumes apiServer.resources apiServer.startupProbe.failureThreshold
config.* dagProcessor.enabled dagProcessor.livenessProbe.command dagProcessor.livenessProbe.timeoutSeconds
dagProcessor.logGroomerSidecar.enabled dagProcessor.resources data.metadataSecretName env executor
fernetKeySecretName images.airflow.repository images.airflow.tag images.migrationsWaitTimeout
images.pod_template.repository images.pod_template.tag jwtSecretName logs.persistence.enabled
logs.persistence.size logs.persistence.storageClassName migrateDatabaseJob.args postgresql.enabled redis.enabled
scheduler.livenessProbe.command scheduler.livenessProbe.timeoutSeconds scheduler.logGroomerSidecar.enabled
scheduler.resources scheduler.startupProbe.command scheduler.startupProbe.failureThreshold
scheduler.startupProbe.timeoutSeconds secret securityContexts.containers securityContexts.pod statsd.enabled
triggerer.livenessProbe.command triggerer.livenessProbe.timeoutSeconds triggerer.logGroomerSidecar.enabled
triggerer.persistence.enabled triggerer.resources webserver.defaultUser.enabled workers.resources
workers.terminationGracePeriodSeconds
"""
LOAD = """
import json, sys
from airflow.dag_processing.dagbag import DagBag
from airflow.providers.cncf.kubernetes.pod_generator import PodGenerator
from airflow.serialization.serialized_objects import DagSerialization
from kubernetes.client import ApiClient, V1Container, V1Pod, V1PodSpec, V1ResourceRequirements
bag, api, found = DagBag(), ApiClient(), {}
workers = json.loads(sys.argv[1])
template = V1Pod(spec=V1PodSpec(containers=[V1Container(name="base", resources=V1ResourceRequirements(**workers))]))
class Response:
    def __init__(self, value):
        self.data = json.dumps(value)
for dag_id, dag in bag.dags.items():
    read = DagSerialization.from_dict(json.loads(json.dumps(DagSerialization.to_dict(dag))))
    for task in dag.tasks:
        config = dict(read.get_task(task.task_id).executor_config or {})
        assert config == dict(task.executor_config or {}), (dag_id, task.task_id)
        pod = PodGenerator.construct_pod(
            dag_id=dag_id, task_id=task.task_id, pod_id="pod", try_number=1, kube_image="image", date=None,
            args=["airflow"], pod_override_object=config.get("pod_override"), base_worker_pod=template,
            namespace="ridgeline", scheduler_job_id="1", run_id="run",
        )
        value = api.sanitize_for_serialization(pod)
        assert api.sanitize_for_serialization(api.deserialize(Response(value), "V1Pod")) == value
        found[f"{dag_id}.{task.task_id}"] = value["spec"] | {"own": "pod_override" in config}
print("\\n" + json.dumps({"errors": bag.import_errors, "pods": found}))
"""


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    """The values, in which templates of Helm stay as they are."""
    loaded: dict[str, Any] = yaml.safe_load(PLACE.read_text())
    return loaded


def variables(values: dict[str, Any]) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in values["env"]}


def test_names_are_those_of_the_chart(values: dict[str, Any]) -> None:
    wanted = {name.removesuffix(".*") for name in CHART.split()}

    def unknown(place: str, value: Any) -> list[str]:
        if place in wanted:
            return []
        if not isinstance(value, dict):
            return [place]
        return [name for key, inner in value.items() for name in unknown(f"{place}.{key}".lstrip("."), inner)]

    assert unknown("", values) == []
    assert all(set(entry) == {"name", "value"} and isinstance(entry["value"], str) for entry in values["env"])
    assert all(set(entry) == {"envName", "secretName", "secretKey"} for entry in values["secret"])
    settings = [value for section in values["config"].values() for value in section.values()]
    assert all(isinstance(value, str) for value in settings)


@pytest.mark.skipif("CHART_SCHEMA" not in os.environ, reason="CHART_SCHEMA names no values.schema.json")
def test_the_chart_s_schema_accepts_them(values: dict[str, Any]) -> None:
    import jsonschema

    jsonschema.validate(values, json.loads(Path(os.environ["CHART_SCHEMA"]).read_text()))


def test_settings_are_known_and_can_be_used(values: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own = {name: value for name, value in variables(values).items() if name.startswith("RIDGELINE_")}
    assert {name.removeprefix("RIDGELINE_").lower() for name in own} <= set(Settings.model_fields)
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.store.startswith("s3://")
    assert settings.serving_url.startswith("s3://")
    assert "train" in settings.step_resources


def test_no_password_is_in_the_file_and_each_secret_is_in_the_documentation(values: dict[str, Any]) -> None:
    text, doc = PLACE.read_text(), (ROOT / "docs" / "kubernetes.md").read_text()
    assert not re.search(r"(?i)(password|secret_key|fernet_key|access_key):\s*\S", text)
    for name in re.findall(r"(?m)^[^#]*?: (ridgeline-[a-z-]+)", text):
        assert f"secret {name} " in doc


def test_servers_start_without_the_scripts_of_airflow_s_image(values: dict[str, Any]) -> None:
    for server in ("scheduler", "dagProcessor", "triggerer"):
        assert values[server]["logGroomerSidecar"]["enabled"] is False
        assert "/entrypoint" not in " ".join(values[server]["livenessProbe"]["command"])
    assert "create_pool()" in " ".join(values["migrateDatabaseJob"]["args"])


def load(values: dict[str, Any], folder: Path, **settings: str) -> Any:
    """Load all DAGs as under KubernetesExecutor, and return the specification of each task's pod."""
    pytest.importorskip("kubernetes", reason="the extra kubernetes is not installed")
    env = environment(folder, "airflow", os.environ)
    (config := Path(env["AIRFLOW_HOME"]) / "config").mkdir(parents=True, exist_ok=True)
    (config / "airflow_local_settings.py").write_text(values["airflowLocalSettings"])
    env |= {"AIRFLOW__CORE__DAGS_FOLDER": str(ROOT / "dags"), "AIRFLOW__CORE__EXECUTOR": values["executor"]} | settings
    command = [sys.executable, "-c", LOAD, json.dumps(values["workers"]["resources"])]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_each_step_gets_its_pod(values: dict[str, Any], tmp_path: Path) -> None:
    given = variables(values)["RIDGELINE_STEP_RESOURCES"]
    loaded = load(values, tmp_path, RIDGELINE_STEP_RESOURCES=given)
    assert loaded["errors"] == {}
    pods, wanted = loaded["pods"], json.loads(given)
    steps = [name for name in pods if name.rpartition(".")[2] in wanted and "maintenance" not in name]
    assert {name.rpartition(".")[2] for name in steps} == set(wanted)
    assert "regularization_path.sweep" in steps  # a mapped task
    for name in steps:
        resources, own = pods[name]["containers"][0]["resources"], wanted[name.rpartition(".")[2]]
        assert resources["requests"] == resources["limits"]
        assert (resources["limits"]["cpu"], resources["limits"]["memory"]) == (str(own["cpu"]), own["memory"])
        assert resources["limits"]["ephemeral-storage"] == own["disk"]
        assert resources["limits"].get("nvidia.com/gpu") == (str(own["gpu"]) if "gpu" in own else None)
        assert bool(pods[name].get("tolerations")) == ("gpu" in own)
    for name in set(pods) - set(steps):
        assert pods[name]["containers"][0]["resources"] == values["workers"]["resources"]
        assert not pods[name]["own"]
    assert {spec["containers"][0]["image"] for spec in pods.values()} == {"image"}


def test_bad_resources_are_an_error_of_the_dag_and_none_change_nothing(values: dict[str, Any], tmp_path: Path) -> None:
    loaded = load(values, tmp_path / "bad", RIDGELINE_STEP_RESOURCES='{"trian": {"cpu": 1, "memory": "1Gi"}}')
    assert loaded["errors"]
    assert all("received trian" in error for error in loaded["errors"].values())
    loaded = load(values, tmp_path / "none")
    assert loaded["errors"] == {}
    assert not any(spec["own"] for spec in loaded["pods"].values())
