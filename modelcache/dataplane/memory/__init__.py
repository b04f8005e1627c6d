"""RAM in pieces, made ready ahead of demand."""
