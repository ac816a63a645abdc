"""Eight processes on one store."""


def test_one_key_runs_once(torture):
    torture("concurrency", "one key", scale=0.05)


def test_clean_up_pushes_and_rollbacks_do_not_disturb_runs(torture):
    torture("concurrency", "gc keeps 1", scale=0.05)
