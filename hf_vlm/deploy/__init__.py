"""A trained model where its users are: predictions, pictures, model cards and the Hub."""
