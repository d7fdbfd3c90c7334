"""Decide before step 0 what a run is and how this machine computes it.

checks.py alone is imported at once, so it imports no torch.
"""
