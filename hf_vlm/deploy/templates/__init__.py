"""Programs that are sent to the Hub; each also runs as it is there."""
