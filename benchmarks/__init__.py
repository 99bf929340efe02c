"""What this project is measured with: see README.md in this folder."""
