"""The built-in images: handwritten digits in photographs, rendered on the fly, offline."""
