"""Everything that people look at: rendered predictions, sheets of images, maps, curves."""
