"""Everything at once, for as long as you like: `python -m tests.chaos --seed=… --duration=…`."""
