"""What each operation costs in Postgres: ``python -m tests.costs`` measures it and writes docs/cost-model.md."""
