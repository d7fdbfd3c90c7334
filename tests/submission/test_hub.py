"""Test the layout of the Hub, and pushes to a stand-in that speaks its protocol on localhost."""

import base64
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import yaml
from conftest import ROOT, build_tiny_model

from babyllama.files import sha256
from babyllama.submission.hub import lay_out_hub_cache, push

MODEL = ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]  # fmt: skip
SECRET = "hf_stand_in"


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


class Hub(ThreadingHTTPServer):
    """Speak the part of the Hub's protocol that a push needs, for one repository in memory."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.created = None  # the request that created the repository
        self.private = False
        self.commits = []  # of every branch: (branch, {path: content} that it adds)
        self.files = {}  # commit -> {path: content}
        self.branches = {}  # name -> commit
        self.large = {}  # SHA-256 -> content
        self.uploads = Counter()  # of large files
        self.refuse = None  # a branch that takes no commits

    def add_commit(self, branch, files):
        commit = hashlib.sha1(f"{len(self.commits)}".encode()).hexdigest()
        self.files[commit] = {**self.files.get(self.branches.get(branch), {}), **files}
        self.branches[branch] = commit
        self.commits.append((branch, sorted(files)))
        return commit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def reply(self, content, status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def handle_request(self):
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path.startswith("/large/"):
            hub.large[path.removeprefix("/large/")] = body
            hub.uploads[path.removeprefix("/large/")] += 1
            return self.reply({})
        if self.headers.get("Authorization") != f"Bearer {SECRET}":
            return self.reply({"error": "Invalid username or password."}, 401)
        if path == "/api/repos/create":
            if hub.created:
                return self.reply({"url": f"{hub.endpoint}/me/tiny"}, 409)
            hub.created = json.loads(body)
            hub.private = hub.created.get("visibility") == "private"
            hub.add_commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            return self.reply({"url": f"{hub.endpoint}/me/tiny"})
        if path == "/api/validate-yaml":
            return self.reply({"errors": [], "warnings": []})
        if path == "/me/tiny.git/info/lfs/objects/batch":
            return self.reply(self.large_files(json.loads(body)["objects"]))
        match = re.fullmatch(r"/api/models/me/tiny(?:/(\w+)/(\w+))?(?:/(\w+))?", path)
        if match is None:
            return self.reply({"error": f"the stand-in does not know {self.command} {path}"}, 404)
        action, branch, _ = match.groups()
        if action is None:
            return self.reply({"id": "me/tiny", "private": hub.private, "sha": "0", "tags": []})
        if action == "revision":
            return self.reply({"id": "me/tiny", "sha": hub.branches[branch], "tags": []})
        if action == "commits":
            ids = [hashlib.sha1(f"{i}".encode()).hexdigest() for i in range(len(hub.commits))]
            own = [i for i, (name, _) in zip(ids, hub.commits, strict=True) if name == branch]
            row = {"authors": [], "date": "2026-01-01T00:00:00.000Z", "title": "", "message": ""}
            return self.reply([{"id": commit, **row} for commit in own[::-1]])
        if action == "branch":
            if branch in hub.branches:
                return self.reply({"error": "Reference already exists"}, 409)
            hub.branches[branch] = json.loads(body)["startingPoint"]
            return self.reply({})
        if action == "preupload":
            return self.reply({"files": self.modes(branch, json.loads(body)["files"])})
        assert action == "commit", path
        if branch == hub.refuse:
            return self.reply({"error": "No space left"}, 403)
        files = {}
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = hub.large[value["oid"]]
        commit = hub.add_commit(branch, files)
        return self.reply({"commitUrl": f"{hub.endpoint}/me/tiny/commit/{commit}", "commitOid": commit})  # fmt: skip

    do_GET = do_POST = do_PUT = handle_request

    def modes(self, branch, files):
        """Store weights as large files; name the hash of each file that the branch has."""
        stored = self.server.files[self.server.branches[branch]]
        rows = []
        for file in files:
            is_large = file["path"].endswith(".safetensors")
            row = {"path": file["path"], "shouldIgnore": False}
            row["uploadMode"] = "lfs" if is_large else "regular"
            content = stored.get(file["path"])
            if content is not None:
                blob = b"blob %d\0" % len(content) + content
                row["oid"] = (hashlib.sha256(content) if is_large else hashlib.sha1(blob)).hexdigest()  # fmt: skip
            rows.append(row)
        return rows

    def large_files(self, objects):
        """Say where to upload each large file that the stand-in does not have yet."""
        rows = []
        for item in objects:
            row = {"oid": item["oid"], "size": item["size"]}
            if item["oid"] not in self.server.large:
                row["actions"] = {"upload": {"href": f"{self.server.endpoint}/large/{item['oid']}"}}
            rows.append(row)
        return {"transfer": "basic", "objects": rows}


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


PUSH = """
import json, sys
from pathlib import Path
from babyllama.submission.hub import push
try:
    push(Path(sys.argv[1]), "me/tiny", **json.loads(sys.argv[2]))
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
"""


def push_to(hub, run_dir, token=SECRET, **options) -> subprocess.CompletedProcess:
    """Push in a process of its own, because huggingface_hub reads its settings when imported."""
    environment = {
        **os.environ,
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",  # large files go over LFS, which the stand-in speaks
        "HF_HOME": str(run_dir / "hf-home"),
        "NO_PROXY": "*",
    }
    environment.pop("HF_TOKEN", None)
    if token:
        environment["HF_TOKEN"] = token
    return subprocess.run(
        [sys.executable, "-c", PUSH, str(run_dir), json.dumps(options)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_a_push_makes_a_branch_of_each_milestone_and_main_of_the_final_model(hub, run_dir):
    done = push_to(hub, run_dir, private=True, license="mit", language="nl")
    assert done.returncode == 0, done.stderr
    assert hub.created["name"] == "tiny"
    assert hub.private
    assert list(hub.branches) == ["main", "chck_2M", "chck_10M"]
    assert [branch for branch, _ in hub.commits[1:]] == ["chck_2M", "chck_10M", "main"]
    for branch in ("chck_2M", "chck_10M"):
        files = hub.files[hub.branches[branch]]
        assert sorted(files) == [".gitattributes", *MODEL]
        assert all(files[name] == (run_dir / branch / name).read_bytes() for name in MODEL)
    main = hub.files[hub.branches["main"]]
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
    done = push_to(hub, run_dir)
    assert done.returncode == 1
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr
    assert [branch for branch, _ in hub.commits] == ["main", "chck_2M"]
    assert hub.files[hub.branches["chck_10M"]].keys() == {".gitattributes"}  # not another model

    hub.refuse = None
    assert push_to(hub, run_dir).returncode == 0
    assert [branch for branch, _ in hub.commits] == ["main", "chck_2M", "chck_10M", "main"]
    assert set(hub.uploads.values()) == {1}
    assert len(hub.uploads) == 3  # the weights of three models

    config = json.loads((run_dir / "chck_2M" / "config.json").read_text())
    (run_dir / "chck_2M" / "config.json").write_text(json.dumps(config))
    assert push_to(hub, run_dir).returncode == 0
    assert hub.commits[4:] == [("chck_2M", ["config.json"])]


def test_a_dry_run_lists_every_file_and_sends_nothing(hub, run_dir):
    done = push_to(hub, run_dir, token=None, dry_run=True)
    assert done.returncode == 0, done.stderr
    assert hub.created is None
    listed = re.findall(r"^(?:me/tiny, branch|   ) (\S+): (\d+) files?, ([\d.,]+) MB$", done.stdout, re.M)  # fmt: skip
    assert [row[0] for row in listed[:12]] == ["chck_2M", *MODEL, "chck_10M", *MODEL]
    assert listed[12][0] == "main"
    assert {"README.md", "metrics.jsonl"} <= {row[0] for row in listed[13:]}
    total = sum((run_dir / "chck_2M" / name).stat().st_size for name in MODEL)
    assert listed[0] == ("chck_2M", "5", f"{total / 1e6:,.2f}")


def test_a_private_push_to_a_public_repository_is_refused(hub, run_dir):
    assert push_to(hub, run_dir).returncode == 0
    commits = list(hub.commits)
    done = push_to(hub, run_dir, private=True, license="mit")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: me/tiny exists and is public")
    assert hub.commits == commits


@pytest.mark.parametrize(
    ("token", "message"),
    [(None, "error: the Hub needs a login: run `hf auth login`"), ("hf_wrong", "401")],
)
def test_a_push_without_a_valid_login_is_one_error(hub, run_dir, token, message):
    done = push_to(hub, run_dir, token=token)
    assert done.returncode == 1
    assert message in done.stderr
    assert "Traceback" not in done.stderr
