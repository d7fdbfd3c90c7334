"""Read, clean and tokenize text."""
