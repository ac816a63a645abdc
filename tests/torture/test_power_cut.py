"""Power cuts: no acknowledged push or rollback is lost, no file is empty, and the store repairs itself."""


def test_power_cuts_with_and_without_the_journal(torture):
    torture("power_cut", scale=0.1)
