"""Floor 0: models, image processor and losses. Flat files that are uploaded verbatim with `trust_remote_code`."""
