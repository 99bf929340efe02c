"""What pages have in common: templates, and how numbers are written."""
