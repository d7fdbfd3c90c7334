"""Keep a run on disk: its files, its checkpoints, and whether it starts or resumes.

Nothing here imports torch.
"""
