"""The champion can be loaded at any time while versions are pushed, rolled back and pruned."""


def test_loads_during_pushes_and_rollbacks(torture):
    torture("loads", scale=0.08)
