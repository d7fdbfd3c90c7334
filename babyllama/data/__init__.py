"""Turn text files into tokens."""
