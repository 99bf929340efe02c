"""How long steps and starts take, against plain Inductor."""
