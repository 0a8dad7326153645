"""Public helpers for tests and demos: embedded servers, fixtures, crash and replay checks."""
