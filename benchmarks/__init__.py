"""Measurements of Cierzo on the machine at hand; `python -m benchmarks` runs them all. See README.md here."""
