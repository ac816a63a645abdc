"""OpenLineage events about the artifacts of a task, for Airflow's OpenLineage provider; nothing without it.

The provider emits events about runs and tasks by itself. This adds what it can't know: which artifacts, sources and
served versions a task read and wrote, each with its digest.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ridgeline.component import Component, Params
from ridgeline.masking import mask
from ridgeline.pipeline import StepResult
from ridgeline.settings import Settings
from ridgeline.store import Store

log = logging.getLogger(__name__)


def emit_lineage(settings: Settings, component: Component, params: Params, result: StepResult) -> None:
    """Emit an event with the datasets that the current task read and wrote, whether its step ran or was reused.

    A dataset is named by its place, as OpenLineage's naming convention says; the facet ``version`` has the digest.
    Nothing happens if the provider is not installed, or has no transport. A failure is logged and raises nothing.

    Args:
        settings: Where the store is.
        component: The step.
        params: Its parameters, which tell where its sources are.
        result: The step's result.
    """
    try:
        from airflow.providers.openlineage.conf import is_disabled
    except ImportError:
        return
    try:
        if not is_disabled():  # the rest of the provider takes a second to import
            from airflow.providers.openlineage.api import emit_dataset_lineage

            store, execution = settings.open_store(), result.execution
            sources = component.sources(params)
            inputs = [_artifact(store, ref) for ref in execution.inputs.values()]
            inputs += [_dataset(sources[name].location, digest) for name, digest in execution.parts.sources.items()]
            outputs = [_artifact(store, execution.output)] if execution.output else []
            if result.pushed and result.pushed.new and execution.output:
                outputs.append(_dataset(result.pushed.place, _digest(execution.output)))
            if inputs or outputs:
                emit_dataset_lineage(inputs=inputs, outputs=outputs)
    except Exception as error:  # nothing here may fail the task
        log.warning("Cannot emit OpenLineage events: %s. The task itself is not affected.", mask(error))


def _artifact(store: Store, ref: str) -> Any:
    return _dataset(store.root / "artifacts" / ref, _digest(ref))


def _digest(ref: str) -> str:
    return ref.rpartition("/")[2]


def _dataset(place: Any, digest: str) -> Any:
    """Return a folder or a prefix of an object store as a dataset of OpenLineage."""
    from openlineage.client.event_v2 import Dataset
    from openlineage.client.facet_v2 import dataset_version_dataset
    from upath import UPath

    path = UPath(place)
    if path.protocol in ("", "file", "local"):
        namespace, name = "file", str(Path(path.path).absolute())
    else:
        host, _, name = path.path.partition("/")
        namespace = f"{path.protocol}://{host}"
    facets = {"version": dataset_version_dataset.DatasetVersionDatasetFacet(datasetVersion=digest)}
    return Dataset(namespace=mask(namespace), name=name, facets=facets)
