"""Damaged records, histories and served files are noticed, and repaired or named with a command that repairs them."""


def test_what_operating_systems_drop_is_ignored(torture):
    torture("corruption", ".DS_Store", scale=0.15)


def test_a_flipped_bit_is_not_believed(torture):
    torture("corruption", "a record's bit", "a history's bit", scale=0.03)


def test_damaged_files_for_other_readers_are_written_again(torture):
    torture("corruption", "other files served", scale=0.1)
