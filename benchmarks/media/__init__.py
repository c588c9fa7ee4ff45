"""Media benchmarks."""
