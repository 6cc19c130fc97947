"""What a recipe costs before it is run: parameters, FLOPs, memory and time on a cluster."""
