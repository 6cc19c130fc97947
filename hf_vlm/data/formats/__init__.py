"""One file per format in which images and labels are stored, and the one normaliser of their objects."""
