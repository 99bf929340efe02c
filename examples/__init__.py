"""Commands to try, and what they and the benchmarks share: data, models, measures."""
