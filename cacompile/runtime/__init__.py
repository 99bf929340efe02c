"""While training runs: monitor (how converged is each group) -> policy (how likely is it kept) -> mask (the draw)."""
