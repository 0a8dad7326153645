"""What each operation costs in Postgres: ``python -m tests.costs`` measures it and writes it into the pages."""
