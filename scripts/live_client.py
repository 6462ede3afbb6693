"""Start a session of a live server, change its prompt once, save the video: an example client.

python scripts/live_client.py "a red ball" --then "a blue ball" --seconds 10
"""

import argparse
import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from websockets.asyncio.client import connect

from utils.cli import run_main


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("prompt", help="what the video shows")
    parser.add_argument("--then", help="what it shows from the middle on")
    parser.add_argument("--policy", default="recache", help="keep, recache, renoise or cut")
    parser.add_argument("--seconds", type=float, default=10.0, help="length (default: 10)")
    parser.add_argument("--address", default="127.0.0.1:7860", help="of the server")
    parser.add_argument("--output", type=Path, default=Path("live.mp4"), help="the file to write")
    return parser


async def watch(args: argparse.Namespace) -> str:
    """Play a session as if on a screen; its id."""
    start = {"type": "session.start", "prompt": args.prompt, "seconds": args.seconds}
    change = {"type": "session.prompt_update", "id": "1", "prompt": args.then}
    async with connect(f"ws://{args.address}/v1/realtime/video") as socket:
        await socket.send(json.dumps(start))
        began, changed, name = time.monotonic(), args.then is None, ""
        async for message in socket:
            played = time.monotonic() - began
            await socket.send(json.dumps({"type": "playhead", "seconds": played}))
            if not changed and played > args.seconds / 2:
                await socket.send(json.dumps(change | {"policy": args.policy}))
                changed = True
            if isinstance(message, bytes):  # fragments of mp4, which a player would append
                continue
            told = json.loads(message)
            name = told["id"] if told["type"] == "session.started" else name
            if told["type"] in ("session.prompt_update.applied", "session.stopped", "error"):
                print(message)
            if told["type"] == "session.stopped":
                break
    return name


def main(argv: Sequence[str]) -> int:
    """Watch, then fetch the whole file."""
    args = build_parser().parse_args(argv)
    name = asyncio.run(watch(args))
    urllib.request.urlretrieve(f"http://{args.address}/v1/sessions/{name}/video.mp4", args.output)
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
