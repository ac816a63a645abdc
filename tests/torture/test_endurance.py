"""Many runs and many records cost no more memory, files or time per run."""


def test_runs_and_records(torture):
    torture("endurance", scale=0.1)
