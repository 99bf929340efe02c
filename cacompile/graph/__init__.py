"""One compiled graph: the hooks that the inner compiler gets, the versions of its backward, what it leaves in logs."""
