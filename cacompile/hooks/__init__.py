"""Where training calls us without knowing: optimizer steps, and the clipping of gradients before them."""
