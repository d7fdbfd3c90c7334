"""Score, generate and grade: everything done with a trained model."""
