"""Deployment of trained models: predictions, model cards, the Hub and suggested next commands."""
