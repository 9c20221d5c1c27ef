"""Benchmarks of aligned models: what is asked, how answers are judged, and the figures that follow."""
