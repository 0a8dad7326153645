"""What each contestant runs: the same work, written as its own users write it."""
