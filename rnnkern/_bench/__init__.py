"""Measuring, for `python -m rnnkern` and `benchmarks/`: paired timing, machine probes, the floor of a recurrence."""
