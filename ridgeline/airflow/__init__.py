"""Ridgeline in Airflow, and the only package that imports Airflow.

- `form`: the params of a DAG, from the parameters of its steps
- `settings`: settings inside of Airflow, where connections can be looked up
- `schedule`: the schedules of the DAGs
- `task`: the work of tasks: run a step, or change which version of a model is served
- `approval`: asks a person in Airflow's web interface whether a model is to be pushed
- `maintenance`: the tasks that delete old artifacts, logs and metadata; `metadata` cleans Airflow's database
- `pool`: the pool that limits how many tasks use TensorFlow at a time
- `reasons`: why tasks were skipped or failed without running a step
- `notifications`: messages about failures and late runs
- `plugin`: the pages in Airflow's web interface
- `server`: start, query and stop a complete Airflow; `standalone` is its main process
- `local`: the commands behind ``make run`` and ``make ui``; `local_data` chooses their data
"""

RERUN = "rerun"  # the param of every training DAG that names steps to run even if nothing changed
REASON = "reason"  # the XCom with the reason why a task was skipped or failed without running a step
