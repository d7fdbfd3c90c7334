"""Test the layout of the Hub, and what a push sends to it."""

import os
import re
import shutil
from types import SimpleNamespace
from unittest.mock import create_autospec

import huggingface_hub
import pytest
import yaml
from conftest import build_tiny_model

from babyllama.files import sha256
from babyllama.submission.hub import lay_out_hub_cache, push

MODEL = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip


@pytest.fixture
def run_dir(finished_copy, tokenizer):
    """Return a finished run with two milestones whose weights differ."""
    _, folder = finished_copy
    for seed, name in enumerate(("chck_2M", "chck_10M")):
        build_tiny_model("Llama", seed=seed).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        (folder / name / "complete.json").write_text("{}")
    return folder


# ---- a cache ------------------------------------------------------------------------------------


def test_every_revision_of_the_cache_loads_offline(run_dir, tmp_path):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lay_out_hub_cache(run_dir, tmp_path / "hub", "me/tiny")
    cache = {"cache_dir": tmp_path / "hub", "local_files_only": True}  # like HF_HUB_CACHE, _OFFLINE
    weights = []
    for revision, folder in [
        ("chck_2M", run_dir / "chck_2M"),
        ("chck_10M", run_dir / "chck_10M"),
        ("main", run_dir),
    ]:
        model = AutoModelForCausalLM.from_pretrained("me/tiny", revision=revision, **cache)
        expected = AutoModelForCausalLM.from_pretrained(folder)
        assert torch.equal(model.lm_head.weight, expected.lm_head.weight)
        tokenizer = AutoTokenizer.from_pretrained("me/tiny", revision=revision, **cache)
        ids = AutoTokenizer.from_pretrained(folder)("The cat")["input_ids"]
        assert tokenizer("The cat")["input_ids"] == ids
        weights.append(model.lm_head.weight.sum().item())
    assert len(set(weights)) == 3


def test_weights_in_the_cache_take_no_space(run_dir, tmp_path):
    folder = lay_out_hub_cache(run_dir, tmp_path / "hub", "me/tiny")
    commit = (folder / "refs" / "chck_2M").read_text()
    snapshot = folder / "snapshots" / commit
    assert sorted(path.name for path in snapshot.iterdir()) == MODEL
    for name in MODEL:
        is_link = os.path.samefile(snapshot / name, run_dir / "chck_2M" / name)
        assert is_link == (name == "model.safetensors")  # programs may rewrite the small files
        assert sha256(snapshot / name) == sha256(run_dir / "chck_2M" / name)


def test_a_cache_is_laid_out_again_after_a_change(run_dir, tmp_path):
    folder = lay_out_hub_cache(run_dir, tmp_path / "hub", "me/tiny")
    old = (folder / "refs" / "chck_2M").read_text()
    shutil.rmtree(run_dir / "chck_10M")
    shutil.copy(run_dir / "model.safetensors", run_dir / "chck_2M")
    lay_out_hub_cache(run_dir, tmp_path / "hub", "me/tiny")
    assert sorted(path.name for path in (folder / "refs").iterdir()) == ["chck_2M", "main"]
    assert (folder / "refs" / "chck_2M").read_text() != old
    assert not (folder / "snapshots" / old).exists()


def test_a_downloaded_repository_is_not_replaced(run_dir, tmp_path):
    (tmp_path / "hub" / "models--me--tiny" / "blobs").mkdir(parents=True)
    with pytest.raises(ValueError, match="models--me--tiny exists and was not written by"):
        lay_out_hub_cache(run_dir, tmp_path / "hub", "me/tiny")


def test_a_folder_without_a_final_model_is_an_error(run_dir, tmp_path):
    (run_dir / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="no final model"):
        lay_out_hub_cache(run_dir, tmp_path / "hub", "me/tiny")


@pytest.mark.parametrize("repo_id", ["tiny", "me/my/tiny", "me/ti ny", "../tiny"])
def test_a_name_that_the_hub_does_not_allow_is_an_error(run_dir, tmp_path, repo_id):
    with pytest.raises(ValueError, match=re.escape(repo_id)):
        lay_out_hub_cache(run_dir, tmp_path / "hub", repo_id)
    with pytest.raises(ValueError, match=re.escape(repo_id)):
        push(run_dir, repo_id, dry_run=True)


# ---- a push -------------------------------------------------------------------------------------


class Hub:
    """Do what HfApi does for a push, and keep in memory what is sent to one repository."""

    def __init__(self):
        self.private = None  # there is no repository yet
        self.files = {"main": {".gitattributes": b""}}  # of each branch
        self.commits = []  # the branch of each, after the one that created the repository
        self.refuse = None  # a branch that takes no commits

    def create_repo(self, repo_id, private, exist_ok):
        self.private = bool(private) if self.private is None else self.private

    def repo_info(self, repo_id):
        return SimpleNamespace(private=self.private)

    def list_repo_commits(self, repo_id):
        newest_first = ["later"] * self.commits.count("main") + ["first"]
        return [SimpleNamespace(commit_id=commit) for commit in newest_first]

    def create_branch(self, repo_id, branch, revision, exist_ok):
        assert revision == "first" and exist_ok
        self.files.setdefault(branch, {".gitattributes": b""})

    def create_commit(self, repo_id, operations, commit_message, revision):
        if revision == self.refuse:
            raise OSError("No space left")
        self.commits.append(revision)
        for operation in operations:
            with operation.as_file() as file:
                self.files[revision][operation.path_in_repo] = file.read()


@pytest.fixture
def hub(monkeypatch):
    hub = Hub()
    # the signatures are those of the real HfApi, so a call that it would refuse fails here too
    api = create_autospec(huggingface_hub.HfApi)
    for name in dir(huggingface_hub.HfApi):
        if not name.startswith("_") and callable(getattr(huggingface_hub.HfApi, name)):
            answer = getattr(hub, name, AssertionError(f"{name}: Hub does not know it"))
            getattr(api.return_value, name).side_effect = answer
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: "hf_stand_in")
    return hub


def test_a_push_makes_a_branch_of_each_milestone_and_main_of_the_final_model(hub, run_dir):
    push(run_dir, "me/tiny", private=True, license="mit", language="nl")
    assert hub.private
    assert hub.commits == ["chck_2M", "chck_10M", "main"]
    for branch in ("chck_2M", "chck_10M"):
        files = hub.files[branch]
        assert sorted(files) == [".gitattributes", *MODEL]
        assert all(files[name] == (run_dir / branch / name).read_bytes() for name in MODEL)
    main = hub.files["main"]
    assert all(main[name] == (run_dir / name).read_bytes() for name in MODEL)

    # every file that the card names is there, and the card differs in two keys only
    card = main["README.md"].decode()
    assert set(re.findall(r"^- `([\w.]+)`:", card, re.M)) <= set(main)
    header, text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", card, re.S).groups()
    original = (run_dir / "README.md").read_text()
    old_header, old_text = re.fullmatch(r"---\n(.*?)\n---\n(.*)", original, re.S).groups()
    assert text == old_text
    expected = {**yaml.safe_load(old_header), "license": "mit", "language": "nl"}
    assert yaml.safe_load(header) == expected


def test_an_interrupted_push_continues(hub, run_dir):
    hub.refuse = "chck_10M"
    with pytest.raises(OSError, match="No space left"):
        push(run_dir, "me/tiny")
    assert hub.files["chck_10M"].keys() == {".gitattributes"}  # not another model
    hub.refuse = None
    push(run_dir, "me/tiny")
    assert hub.commits == ["chck_2M", "chck_2M", "chck_10M", "main"]
    push(run_dir, "me/tiny")  # branches still start at the first commit


def test_a_dry_run_lists_every_file_and_sends_nothing(hub, run_dir, monkeypatch, capsys):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    push(run_dir, "me/tiny", dry_run=True)
    assert hub.private is None
    output = capsys.readouterr().out
    listed = re.findall(r"^(?:me/tiny, branch|   ) (\S+): (\d+) files?, ([\d.,]+) MB$", output, re.M)  # fmt: skip
    assert [row[0] for row in listed[:12]] == ["chck_2M", *MODEL, "chck_10M", *MODEL]
    assert listed[12][0] == "main"
    assert {"README.md", "metrics.jsonl"} <= {row[0] for row in listed[13:]}
    total = sum((run_dir / "chck_2M" / name).stat().st_size for name in MODEL)
    assert listed[0] == ("chck_2M", "5", f"{total / 1e6:,.2f}")


def test_a_private_push_to_a_public_repository_is_refused(hub, run_dir):
    push(run_dir, "me/tiny")
    commits = list(hub.commits)
    with pytest.raises(ValueError, match="me/tiny exists and is public"):
        push(run_dir, "me/tiny", private=True, license="mit")
    assert hub.commits == commits


def test_a_push_without_a_login_is_an_error(hub, run_dir, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(ValueError, match="the Hub needs a login: run `hf auth login`"):
        push(run_dir, "me/tiny")
    assert hub.private is None
