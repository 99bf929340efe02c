"""After each step: monitor (how converged is a group) -> policy (how often is it computed) -> turns (whose turn)."""
