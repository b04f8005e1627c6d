"""Image files: written, read, and kept for the next process."""
