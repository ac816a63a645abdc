"""SIGKILL at random moments: nothing acknowledged is lost, nothing is damaged, and the next start clears the rest."""


def test_kills_of_steps_pushes_rollbacks_and_clean_ups(torture):
    torture("kills", "steps, push", scale=0.03)
