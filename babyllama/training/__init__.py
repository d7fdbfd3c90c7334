"""Train models: the loss, the steps, and what a run logs and reports."""
