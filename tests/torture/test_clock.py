"""A clock that is wrong keeps the order of history and records."""


def test_clocks_that_step_back_or_differ(torture):
    torture("clock", scale=0.1)
