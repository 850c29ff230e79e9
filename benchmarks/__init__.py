"""The comparison with torch.nn: `python -m benchmarks.report`, and pytest-benchmark suites."""
