"""Bytes to networks, and back: what a file may do, and how one is written."""
