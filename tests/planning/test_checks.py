"""Test what is checked before a run starts."""

import pytest

from babyllama.planning.checks import require_gpus


def test_sharding_needs_gpus(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(ValueError, match="training.fsdp: true needs one GPU per process"):
        require_gpus()
