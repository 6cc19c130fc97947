"""All pictures: rendered predictions, sheets of images, maps, curves."""
