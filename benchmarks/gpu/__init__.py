"""Everything about one GPU in one command."""
