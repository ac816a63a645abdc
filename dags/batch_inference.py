"""Predict the class of each image in a folder with a served model. The result is a Parquet file.

Trigger a run with the folder: a path that the workers see, or a URL such as `s3://bucket/prefix`. Each file of the
folder and its subfolders is a row with its path, class and probability; for a file that is no image, the column `error`
says why. The log of the task names the Parquet file. Nothing is trained: the model's champion predicts, or the version
on the form.

`RIDGELINE_INFERENCE_SCHEDULE` starts runs by itself: at times, or (`pushed`) when `fashion_mnist` has another champion.
`RIDGELINE_DEFAULTS` then gives the folder as `infer.folder`.
"""

from __future__ import annotations

from dags.inference import inference_dag

inference_dag("batch", "Batch", __doc__, model="fashion_mnist")
