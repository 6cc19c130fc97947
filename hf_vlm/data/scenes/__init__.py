"""The built-in images: objects pasted into pictures, rendered on the fly, offline."""
