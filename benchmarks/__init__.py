"""Benchmarks and studies behind the results in docs/."""
