"""Keep runs on disk: files, checkpoints, how a run starts and ends, and sweeps of several runs.

Nothing here imports torch.
"""
