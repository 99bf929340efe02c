"""What skipping does to quality, against shorter dense runs."""
