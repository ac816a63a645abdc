"""Side-by-side measurements, printed by ``make bench``. Machines differ: compare the ratios within one run."""
