"""How fast it is beside what one would use instead, on one machine, in turns: ``python -m tests.benchmarks``."""
