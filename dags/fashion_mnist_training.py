"""Train a Fashion-MNIST classifier with L1 and L2 penalties, evaluate it, and serve it if it passes the gate.

Each task runs its step, or reuses an earlier artifact if inputs, parameters and code are the same. The task's log
states which, and why. Tasks pass names of artifacts to each other, never data.

Trigger a run with parameters of your choice: a bad value is refused before any step runs. Runs also start weekly, or
as `RIDGELINE_SCHEDULE` says, and when the asset `fashion_mnist_source` changes. A run in which nothing changed reuses
every artifact and serves no new version.
"""

from __future__ import annotations

from dags.training import training_dag

training_dag("fashion_mnist", "Fashion-MNIST", __doc__)
