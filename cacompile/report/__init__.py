"""What a user can see: what would be skipped and why not (explain), and where training stands (status)."""
