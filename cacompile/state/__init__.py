"""What is known of a model's blocks while it trains: a row each, the graphs that read them, and what was noted."""
