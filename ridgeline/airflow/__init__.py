"""Ridgeline in Airflow, and the only package that imports Airflow.

- `form`: a DAG's parameters, from those of its steps
- `schedule`: when a DAG runs by itself
- `task`: what a task does: run a step, or roll a model back
- `notifications`: messages about failures and late runs
- `plugin`: the pages in Airflow's web interface
- `server`: a whole Airflow, started and stopped
- `local`: the commands behind ``make run`` and ``make ui``; `local_data` chooses their data
"""

RERUN = "rerun"  # the param of every training DAG that names steps to run even if nothing changed
REASON = "reason"  # the XCom in which a task says why it was skipped or failed, if no step ran in it
