"""Floor 2: images in, batches out. Sources, decoding, shuffling, views, transforms, collators, built-in images."""
