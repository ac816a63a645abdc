"""The events that a model has another champion, for DAGs that follow."""

from __future__ import annotations

from airflow.sdk import Asset, AssetAlias

# A task that declares an asset itself creates an event of it in each run. One that declares this alias creates events
# of the assets that it adds while it runs.
CHAMPIONS = AssetAlias("champions")


def pushed_model(model: str) -> Asset:
    """Return the asset that gets an event whenever a model has another champion, by a push, a promotion or a rollback.

    Args:
        model: The model's name in the registry.
    """
    return Asset(f"{model}_pushed_model")
