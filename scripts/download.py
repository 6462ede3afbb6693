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
from typing import Any

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

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

    huggingface_hub keeps and checks what is there, goes on with what broke off, and compares sizes.

    Raises:
        UserError: no network, no such repository or file, no space, or a wrong size at the end.
    """
    from huggingface_hub import DryRunFileInfo, HfApi, errors, snapshot_download

    def snapshot(**how: Any) -> Any:
        return snapshot_download(
            download.repo_id,
            repo_type=download.repo_type,
            allow_patterns=list(download.files),
            local_dir=root / download.folder,
            **how,
        )

    try:
        commit = HfApi().repo_info(download.repo_id, repo_type=download.repo_type).sha
        planned: list[DryRunFileInfo] = snapshot(revision=commit, dry_run=True)
        for pattern in download.files:
            if not any(fnmatchcase(file.filename, pattern) for file in planned):
                raise UserError(
                    f"{download.repo_id} holds no {pattern} (any more): look at its page for it."
                )
        check_space(root, sum(file.file_size or 0 for file in planned if file.will_download))
        snapshot(revision=commit)
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
    return [root / download.folder / file.filename for file in planned]


def check_space(root: Path, needed: int) -> None:
    """Raise UserError if the disk of `root` has no room for so many bytes."""
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    if needed > free:
        raise UserError(
            f"{needed / 1e9:.1f} GB are needed and {free / 1e9:.1f} GB are free in "
            f"{root.resolve()}: make room or give another --root."
        )


if __name__ == "__main__":
    sys.exit(run_main(main))
