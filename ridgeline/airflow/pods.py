"""Resources of the pods in which Airflow's KubernetesExecutor runs the steps.

Airflow calls `task_policy` if its `airflow_local_settings` imports it, as `docker/kubernetes/values.yaml` does. Under
other executors nothing calls it, and the package `kubernetes` is not needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ridgeline.airflow.pool import TENSORFLOW
from ridgeline.airflow.settings import AirflowSettings

if TYPE_CHECKING:
    from kubernetes.client import V1Pod

    from ridgeline.resources import StepResources

CONTAINER = "base"  # the name of the container that runs the task
GPU = "nvidia.com/gpu"


def task_policy(task: Any) -> None:
    """Give the pod of a step the resources that ``RIDGELINE_STEP_RESOURCES`` names.

    Airflow calls this for each task of each DAG that it reads. Tasks of other DAGs, which do not use the pool of
    TensorFlow, stay as they are, and so does what a DAG itself sets in ``executor_config``.

    Args:
        task: The task.

    Raises:
        SettingsError: If a setting is bad; Airflow shows it as an error of the DAG.
    """
    if task.pool != TENSORFLOW or "pod_override" in (task.executor_config or {}):
        return
    if resources := AirflowSettings().step_resources.get(task.task_id):
        config = {**(task.executor_config or {}), "pod_override": pod(resources)}
        if task.is_mapped:
            task.partial_kwargs["executor_config"] = config
        else:
            task.executor_config = config


def pod(resources: StepResources) -> V1Pod:
    """Return what a pod gets in place of its template's values.

    Requests and limits are the same: the step gets what it may use, and is evicted last. A pod with GPUs tolerates
    the taint that nodes with GPUs usually have.

    Args:
        resources: What the step needs.
    """
    from kubernetes.client import V1Container, V1Pod, V1PodSpec, V1ResourceRequirements, V1Toleration

    given = {"cpu": resources.cpu, "memory": resources.memory}
    given |= {"ephemeral-storage": resources.disk} if resources.disk else {}
    given |= {GPU: str(resources.gpu)} if resources.gpu else {}
    container = V1Container(name=CONTAINER, resources=V1ResourceRequirements(requests=given, limits=dict(given)))
    taint = V1Toleration(key=GPU, operator="Exists", effect="NoSchedule")
    return V1Pod(spec=V1PodSpec(containers=[container], tolerations=[taint] if resources.gpu else None))
