"""What examples become on their way into a model: views, detection inputs, and batches."""
