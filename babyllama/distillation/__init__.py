"""Train a student from teachers."""
