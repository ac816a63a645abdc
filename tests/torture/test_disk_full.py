"""A full disk: a message that says what to do, a record, and the store as before."""


def test_a_full_disk_at_every_page_of_the_toy_steps(torture):
    torture("disk_full", "toy steps", scale=0.25)
