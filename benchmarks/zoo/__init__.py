"""Models that others wrote: what is masked, and whether it is right."""
