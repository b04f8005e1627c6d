"""What memory there is, and who has it."""
