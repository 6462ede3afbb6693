"""The script is run as a user runs it, against a small imitation of the hub."""

import json
import os
import random
import subprocess
import sys
import threading
import time
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMIT = "c" * 40


class Hub(ThreadingHTTPServer):
    """Repositories as `{(type, id): {file: bytes}}`, with faults to order.

    `claimed` overrides stated sizes, `drop_after` ends the first transfer of a file after so many
    bytes, `refused` files answer 403.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = {}
        self.claimed = {}
        self.drop_after = {}
        self.refused = set()
        self.requests = []
        self.address = f"http://127.0.0.1:{self.server_port}"

    def downloads(self):
        return [(path, start) for method, path, start in self.requests if method == "GET"]


class HubHandler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def answer(self):
        path = self.path.split("?")[0].lstrip("/")
        if path.startswith("api/"):
            plural, owner, name, *rest = path.removeprefix("api/").split("/")
            files = self.server.repositories.get((plural.rstrip("s"), f"{owner}/{name}"))
            if files is None:
                return self.send(404, b"", {"X-Error-Code": "RepoNotFound"})
            about = self.tree(files) if rest[:1] == ["tree"] else self.info(plural, owner, name)
            return self.send(200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        head, _, tail = path.partition("/resolve/")
        kind, repo = ("space", head[7:]) if head.startswith("spaces/") else ("model", head)
        return self.send_file(self.server.repositories[kind, repo], tail.partition("/")[2])

    def info(self, plural, owner, name):
        return {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": [], "plural": plural}

    def tree(self, files):
        sizes = {name: len(content) for name, content in files.items()}
        sizes.update({n: s for n, s in self.server.claimed.items() if n in sizes})
        return [
            {"type": "file", "path": name, "size": size, "oid": sha256(name.encode()).hexdigest()}
            for name, size in sizes.items()
        ]

    def send_file(self, files, name):
        content = files[name]
        etag = sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
        headers["X-Linked-Size"] = str(self.server.claimed.get(name, len(content)))
        start = int(self.headers.get("Range", "bytes=0-")[6:].rstrip("-"))
        if name in self.server.refused:
            return self.send(403, b"", {})
        self.server.requests.append((self.command, name, start))
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        drop = self.server.drop_after.pop(name, None) if self.command == "GET" else None
        return self.send(206 if start else 200, content[start:], headers, drop)

    def send(self, status, body, headers, drop=None):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:drop])
        self.close_connection = drop is not None


@pytest.fixture
def hub():
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def download(hub, tmp_path):
    def run(*arguments, endpoint=hub.address):
        quiet = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        local = {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf"), "NO_PROXY": "*"}
        kept = {k: v for k, v in os.environ.items() if not k.lower().endswith(("_proxy", "token"))}
        return subprocess.run(
            [sys.executable, str(ROOT / "scripts/download.py"), *arguments],
            env={**kept, **quiet, **local, "HF_HUB_DISABLE_XET": "1"},
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


def fails(result, message):
    """Exit code 2 and one sentence."""
    lines = result.stderr.strip().splitlines()
    return result.returncode == 2 and message in lines[-1] and "Traceback" not in result.stderr


@pytest.mark.slow
def test_model_goes_to_its_folder_and_is_not_fetched_twice(hub, download, tmp_path):
    wanted = {
        "config.json": b"{}",
        "diffusion_pytorch_model.safetensors": b"weights" * 1000,
        "models_t5_umt5-xxl-enc-bf16.pth": b"text",
        "Wan2.1_VAE.pth": b"vae",
        "google/umt5-xxl/tokenizer.json": b"tokens",
    }
    hub.repositories["model", "Wan-AI/Wan2.1-T2V-1.3B"] = {**wanted, "assets/logo.png": b"logo"}
    result = download("wan2.1-1.3b", "--root", "here")
    assert result.returncode == 0, result.stderr
    assert "Apache-2.0" in result.stdout
    folder = tmp_path / "here" / "wan_models" / "Wan2.1-T2V-1.3B"
    assert {name: (folder / name).read_bytes() for name in wanted} == wanted
    assert not (folder / "assets").exists()
    assert sorted(path for path, _ in hub.downloads()) == sorted(wanted)

    hub.requests.clear()
    assert download("wan2.1-1.3b", "--root", "here").returncode == 0
    assert hub.downloads() == []

    damaged = folder / "Wan2.1_VAE.pth"  # only this one is fetched again
    damaged.write_bytes(b"va")
    os.utime(damaged, (time.time() + 60,) * 2)
    assert download("wan2.1-1.3b", "--root", "here").returncode == 0
    assert hub.downloads() == [("Wan2.1_VAE.pth", 0)]
    assert (folder / "Wan2.1_VAE.pth").read_bytes() == b"vae"


@pytest.mark.slow
def test_dropped_connection_is_taken_up_where_it_broke(hub, download, tmp_path):
    name, chunk = "checkpoints/rolling_forcing_dmd.pt", 10 * 1024 * 1024  # the library's chunk
    content = random.Random(0).randbytes(chunk + 200_000)
    hub.repositories["model", "TencentARC/RollingForcing"] = {name: content}
    hub.drop_after[name] = chunk + 100_000
    result = download("rolling-forcing")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / name).read_bytes() == content
    assert hub.downloads() == [(name, 0), (name, chunk)]


@pytest.mark.slow
def test_second_run_fetches_only_what_the_first_did_not_get(hub, download, tmp_path):
    files = {f"prompts/MovieGenVideoBench{end}.txt": b"a cat\n" for end in ("", "_extended")}
    first, second = files
    hub.repositories["space", "multimodalart/self-forcing"] = files
    hub.refused.add(second)
    assert fails(download("moviegen-prompts"), "complete files are kept")
    assert not (tmp_path / second).exists()
    hub.refused.clear()
    assert download("moviegen-prompts").returncode == 0
    assert hub.downloads().count((first, 0)) == 1
    assert (tmp_path / second).read_bytes() == b"a cat\n"


def test_prompt_files_come_from_a_space_and_from_a_model(hub, download, tmp_path):
    short, long = b"a cat\n", b"a long cat\n"
    hub.repositories["space", "multimodalart/self-forcing"] = {
        "prompts/MovieGenVideoBench.txt": short,
        "prompts/MovieGenVideoBench_extended.txt": long,
    }
    hub.repositories["model", "gdhe17/Self-Forcing"] = {"vidprom_filtered_extended.txt": long}
    result = download("moviegen-prompts", "vidprom-prompts")
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "prompts" / "MovieGenVideoBench.txt").read_bytes() == short
    assert (tmp_path / "prompts" / "vidprom_filtered_extended.txt").read_bytes() == long


def test_wrong_size_is_refused_and_removed(hub, download, tmp_path):
    hub.repositories["model", "gdhe17/Self-Forcing"] = {"checkpoints/ode_init.pt": b"short"}
    hub.claimed["checkpoints/ode_init.pt"] = 6
    assert fails(download("ode-init"), "should be of size 6")
    assert not (tmp_path / "checkpoints" / "ode_init.pt").exists()


def test_file_gone_from_the_repository(hub, download, tmp_path):
    hub.repositories["model", "gdhe17/Self-Forcing"] = {"README.md": b"moved"}
    assert fails(download("self-forcing"), "holds no checkpoints/self_forcing_dmd.pt")
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.slow
def test_what_cannot_be_had_is_one_sentence(hub, download):
    assert fails(download("ode-init"), "gdhe17/Self-Forcing is not on the hub")
    assert fails(download("ode-init", endpoint="http://127.0.0.1:9"), "check the network")
    assert fails(download("rolling-forcin"), "did you mean rolling-forcing?")
    assert fails(download(), "Say what to fetch")
    hub.repositories["model", "gdhe17/Self-Forcing"] = {"checkpoints/ode_init.pt": b"x"}
    hub.claimed["checkpoints/ode_init.pt"] = 10**18
    assert fails(download("ode-init"), "make room")


def test_list_needs_no_network(hub, download):
    result = download("--list", endpoint="http://127.0.0.1:9")
    assert result.returncode == 0
    for name in ("wan2.1-14b", "rolling-forcing", "vidprom-prompts"):
        assert any(line.startswith(name) for line in result.stdout.splitlines())
