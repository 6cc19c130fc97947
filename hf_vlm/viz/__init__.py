"""Everything that people look at: drawn predictions, sheets of images, maps, curves."""
