"""Odd parameters and settings are refused by name, with no other exception."""


def test_parameters_through_the_form_and_on_the_command_line(torture):
    torture("inputs", "parameter sets", "odd values", scale=0.02)


def test_odd_settings(torture):
    torture("inputs", "odd settings", scale=0.1)
