"""What is known of a model's graphs: what can be skipped, by which operation, and why the rest cannot."""
