"""While training runs: monitor (how converged is a group) -> policy (how often is it computed) -> mask (whose turn)."""
