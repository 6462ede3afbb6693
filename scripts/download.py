"""Fetch published weights and prompt files into the places where the program looks for them.

    python scripts/download.py --list
    python scripts/download.py wan2.1-1.3b rolling-forcing

A dropped connection is taken up where it broke. The same command again keeps and checks the files
that are complete and fetches the others. `HF_ENDPOINT` names another hub. Exit code 2, with one
sentence, if something is not to be had.
"""

import argparse
import difflib
import shutil
import sys
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from utils.cli import run_main
from utils.downloads import DOWNLOADS, Download
from utils.errors import UserError


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="what to fetch; --list shows the names")
    parser.add_argument("--list", action="store_true", help="show what can be fetched")
    parser.add_argument("--root", type=Path, default=Path(), help="folder to fetch into (.)")
    return parser


def main(argv: Sequence[str]) -> int:
    """Fetch what is named, or list what there is."""
    args = build_parser().parse_args(argv)
    downloads = chosen_downloads(args.names)
    if args.list:
        print(table())
        return 0
    if not downloads:
        raise UserError(f"Say what to fetch: {', '.join(DOWNLOADS)}.")
    for name, download in downloads.items():
        print(f"{name}: {download.repo_id}, licence: {download.licence}", flush=True)
        for path in fetch(download, args.root):
            print(f"  {path} ({path.stat().st_size:,} bytes)", flush=True)
    return 0


def chosen_downloads(names: Sequence[str]) -> dict[str, Download]:
    """The downloads of these names, each once; raises UserError for an unknown name."""
    for name in names:
        if name not in DOWNLOADS:
            near = difflib.get_close_matches(name, DOWNLOADS, n=1)
            hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(DOWNLOADS)}."
            raise UserError(f"There is no download {name!r}: {hint}")
    return {name: DOWNLOADS[name] for name in names}


def table() -> str:
    """All downloads, one per line."""
    rows = [("name", "from", "into", "size", "licence", "for")]
    for name, d in DOWNLOADS.items():
        rows.append((name, d.repo_id, d.folder, d.size or "?", d.licence, d.purpose))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
    return "\n".join(lines)


def fetch(download: Download, root: Path) -> list[Path]:
    """Fetch the files below `root`; returns their paths.

    A complete file is kept; a file of another size than the hub's is fetched again.

    Raises:
        UserError: no network, no such repository or file, no space, or a wrong size at the end.
    """
    from huggingface_hub import errors, snapshot_download

    folder = root / download.folder
    try:
        commit, sizes = hub_files(download)
        missing = discard_wrong_sizes(folder, sizes)
        check_space(root, missing)
        snapshot_download(
            download.repo_id,
            repo_type=download.repo_type,
            revision=commit,
            allow_patterns=list(sizes),
            local_dir=folder,
        )
    except errors.GatedRepoError as error:
        raise UserError(
            f"{download.repo_id} asks you to accept its terms: do so on its page, "
            "then set HF_TOKEN."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{download.repo_id} is not on the hub (any more), or HF_TOKEN is wrong."
        ) from error
    except (errors.HTTPError, OSError) as error:  # no connection, an error status, a full disk
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"Cannot fetch {download.repo_id} ({reason}): check the network and HF_ENDPOINT, "
            "then run the same command again (complete files are kept)."
        ) from error
    wrong = discard_wrong_sizes(folder, sizes)
    if wrong:
        raise UserError(f"{', '.join(wrong)} arrived incomplete: run the same command again.")
    return [folder / name for name in sizes]


def hub_files(download: Download) -> tuple[str, dict[str, int]]:
    """The repository's newest commit, and name and size in bytes of each wanted file there."""
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    name, kind = download.repo_id, download.repo_type
    commit = HfApi().repo_info(name, repo_type=kind).sha
    assert commit is not None, "the hub names the commit of every repository"
    tree = HfApi().list_repo_tree(name, repo_type=kind, revision=commit, recursive=True)
    there = {file.path: file.size for file in tree if isinstance(file, RepoFile)}
    sizes = {}
    for pattern in download.files:
        found = {name: size for name, size in there.items() if fnmatchcase(name, pattern)}
        if not found:
            raise UserError(
                f"{download.repo_id} holds no {pattern} (any more): look at its page for it."
            )
        sizes.update(found)
    return commit, sizes


def discard_wrong_sizes(folder: Path, sizes: dict[str, int]) -> dict[str, int]:
    """Remove files of a wrong size; returns name and size of all that are not there."""
    missing = {}
    for name, size in sizes.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            path.unlink(missing_ok=True)
            missing[name] = size
    return missing


def check_space(root: Path, missing: dict[str, int]) -> None:
    """Raise UserError if the disk of `root` has no room for the missing files."""
    root.mkdir(parents=True, exist_ok=True)
    needed, free = sum(missing.values()), shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free in "
            f"{root.resolve()}: make room or give another --root."
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
