"""Arrange a run as the Hugging Face Hub stores it: the final model, and one branch per milestone.

    lay_out_hub_cache(run_dir, Path("hub"), "me/tiny")  # then `revision=` works offline
    push(run_dir, "me/tiny", private=True)  # uploads; the only function that uses the network

BabyLM's pipeline loads the checkpoints of a model by their branch names, chck_1M and so on.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

import huggingface_hub  # its parts are loaded at their first use
from huggingface_hub.file_download import repo_folder_name
from huggingface_hub.utils import validate_repo_id

from babyllama.files import atomic_write, check_replaceable, sha256
from babyllama.model_dir import is_model
from babyllama.runs.checkpoints import milestones
from babyllama.runs.run_dir import (
    COMPLIANCE_FILE,
    CONFIG_FILE,
    DATA_REPORT_FILE,
    LOG_FILE,
    METRICS_FILE,
)

CARD_FILE = "README.md"
MODEL_FILES = (  # patterns of what from_pretrained reads
    "config.json",
    "generation_config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
)
RUN_FILES = (  # the model card, and the files that it names
    CARD_FILE,
    "training_curves.png",
    CONFIG_FILE,
    DATA_REPORT_FILE,
    LOG_FILE,
    METRICS_FILE,
    COMPLIANCE_FILE,
)


def check_repo_id(repo_id: str) -> None:
    """Raise ValueError unless a name has the form USER/NAME and the characters the Hub allows."""
    if repo_id.count("/") != 1:
        raise ValueError(f'"{repo_id}": name a repository of the Hub as USER/NAME')
    validate_repo_id(repo_id)


def branches(run_dir: Path) -> dict[str, list[Path]]:
    """Return the files of each branch: the milestones, fewest words first, and `main`.

    Raise FileNotFoundError if the run has no final model.
    """
    if not is_model(run_dir):
        raise FileNotFoundError(f"{run_dir}: no final model here; give the directory of a run")
    files = {folder.name: _existing(folder, MODEL_FILES) for folder in milestones(run_dir)}
    files["main"] = _existing(run_dir, MODEL_FILES + RUN_FILES)
    return files


def _existing(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    paths = []
    for pattern in patterns:
        paths += sorted(folder.glob(pattern))
    return paths


def lay_out_hub_cache(run_dir: Path, cache_dir: Path, repo_id: str) -> Path:
    """Lay a run out as a cache of the Hub, and return the folder of the repository in it.

    With HF_HUB_CACHE=cache_dir and HF_HUB_OFFLINE=1, from_pretrained(repo_id, revision="chck_1M")
    loads that milestone. Weights are hard links if the file system permits them, so the cache needs
    hardly any space. An earlier layout is replaced; a repository that was downloaded is not.
    """
    check_repo_id(repo_id)
    files_of = branches(run_dir)
    folder = Path(cache_dir, repo_folder_name(repo_id=repo_id, repo_type="model"))
    # a download always has blobs; here the snapshots hold the files themselves
    check_replaceable(folder, not (folder / "blobs").exists(), "name another folder")
    with atomic_write(folder) as draft:
        (draft / "refs").mkdir(parents=True)
        for branch, paths in files_of.items():
            digest = hashlib.sha256("".join(map(sha256, paths)).encode()).hexdigest()
            commit = digest[:40]  # the length of a git commit
            snapshot = draft / "snapshots" / commit
            snapshot.mkdir(parents=True, exist_ok=True)
            for path in paths:
                _link_or_copy(path, snapshot / path.name)
            (draft / "refs" / branch).write_text(commit, encoding="ascii")
    return folder


def _link_or_copy(source: Path, target: Path) -> None:
    """Link weights, which no program changes in place; copy other files, which are small."""
    if target.exists():  # two milestones with equal files share a snapshot
        return
    if source.suffix == ".safetensors":
        try:
            os.link(source, target)
            return
        except OSError:  # another disk, or a file system without hard links
            pass
    shutil.copyfile(source, target)


def push(
    run_dir: Path,
    repo_id: str,
    *,
    private: bool = False,
    license: str | None = None,
    language: str | None = None,
    dry_run: bool = False,
) -> None:
    """Upload a run to the Hub: each milestone as a branch, then the final model as `main`.

    `license` and `language` go into the metadata of the model card. Files that the Hub already has
    are not sent again, so a push that was interrupted continues. A line is printed for each branch.
    With `dry_run`, only list the files; nothing uses the network. Raise ValueError without a login
    or for a private push to a public repository, and OSError if the Hub refuses.
    """
    check_repo_id(repo_id)
    contents_of = {
        branch: {path.name: path for path in paths} for branch, paths in branches(run_dir).items()
    }
    card = contents_of["main"].get(CARD_FILE)
    if card is not None:
        contents_of["main"][CARD_FILE] = _card(card, license, language)

    if dry_run:
        for branch, contents in contents_of.items():
            print(f"{repo_id}, branch {branch}: {_size(contents.values())}")
            for name, content in contents.items():
                print(f"    {name}: {_size([content])}")
        return

    # find or create the repository
    if huggingface_hub.get_token() is None:
        raise ValueError("the Hub needs a login: run `hf auth login`, or set $HF_TOKEN")
    api = huggingface_hub.HfApi()
    api.create_repo(repo_id, private=private or None, exist_ok=True)
    if private and not api.repo_info(repo_id).private:
        raise ValueError(
            f"{repo_id} exists and is public; make it private, or push without --private"
        )

    # start branches at the first commit, so that none ever shows the weights of the final model
    first_commit = api.list_repo_commits(repo_id)[-1].commit_id
    for branch, contents in contents_of.items():
        print(f"{repo_id}, branch {branch}: {_size(contents.values())}")
        if branch != "main":
            api.create_branch(repo_id, branch=branch, revision=first_commit, exist_ok=True)
        # this sends only what the branch does not have yet
        api.create_commit(
            repo_id,
            [
                huggingface_hub.CommitOperationAdd(name, content)
                for name, content in contents.items()
            ],
            commit_message=f"Add {branch} of {run_dir.name}",
            revision=branch,
        )


def _size(contents: Iterable[Path | bytes]) -> str:
    """Describe how much some files, given as paths or as their content, hold together."""
    sizes = [len(item) if isinstance(item, bytes) else item.stat().st_size for item in contents]
    return f"{len(sizes)} file{'s' * (len(sizes) != 1)}, {sum(sizes) / 1e6:,.2f} MB"


def _card(path: Path, license: str | None, language: str | None) -> bytes:
    """Return the model card with the licence and language set in its metadata, if given."""
    card = huggingface_hub.ModelCard(path.read_text(encoding="utf-8"))
    if license:
        card.data.license = license
    if language:
        card.data.language = language
    return str(card).encode()
