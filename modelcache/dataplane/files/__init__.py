"""Bytes of weight files into memory."""
