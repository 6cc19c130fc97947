"""What reports of evaluations are made of, and the parts that each task puts into them."""
