"""What a run did, from its saved state: as a page, as rows, for TensorBoard and in the terminal."""
