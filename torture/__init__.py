"""`make torture`: kills, power cuts, corruption, load and odd inputs, on small stores, seeded, with a table of results.

Each module but `report`, `toys` and `world` is one part of the table. Nothing imports this package but its tests.
"""
