"""The pipeline's steps, one module each: pure functions from artifacts and parameters to an artifact.

No step imports Airflow or reads the environment; TensorFlow is imported only inside functions, so that
checking whether a step must run stays cheap.
"""
