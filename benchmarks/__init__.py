"""Side-by-side measurements, printed by ``make bench``; ratios of one run, since machines differ."""
