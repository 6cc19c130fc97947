"""Bytes: files and URLs, image headers, decoding, tars, streams by position, messages."""
