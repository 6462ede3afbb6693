"""Start a session of a live server, change its prompt once, save the video: an example client."""

import argparse
import asyncio
import json
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run by its path: the tree that it lies in comes first
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from utils.cli import run_main
from utils.errors import UserError
from utils.files import written


def build_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("prompt", help="what the video shows")
    parser.add_argument("--then", help="what it shows from the middle on")
    parser.add_argument("--policy", default="recache", help="keep, recache, renoise or cut")
    parser.add_argument("--seconds", type=float, default=10.0, help="its length")
    parser.add_argument("--address", default="127.0.0.1:7860", help="of the server")
    parser.add_argument("--token", help="what the server printed in its address")
    parser.add_argument("--output", default="live.mp4", help="the file to write")
    return parser


async def watch(args: argparse.Namespace) -> tuple[str, str]:
    """Play a session as if on a screen; its id, and what the server said if it ended in an error.

    UserError if the server starts none.
    """
    from websockets.asyncio.client import connect

    start = {"type": "session.start", "prompt": args.prompt, "seconds": args.seconds}
    change = {"type": "session.prompt_update", "id": "1", "prompt": args.then}
    address = f"ws://{args.address}/v1/realtime/video"
    largest = 2**24  # bytes of a message: some frames of a large video
    async with connect(address, additional_headers=headers(args), max_size=largest) as socket:
        await socket.send(json.dumps(start))
        began, name, changes = time.monotonic(), "", [] if args.then is None else [change]
        async for message in socket:  # texts are JSON, bytes are mp4 that a player would append
            told = json.loads(message) if isinstance(message, str) else {"type": "video"}
            name = told["id"] if told["type"] == "session.started" else name
            if told["type"] in ("error", "session.prompt_update.applied"):
                print(message)
            if told["type"] == "error" and not name:
                raise UserError(told["message"])
            if told["type"] == "session.stopped":
                return name, ""
            if told["type"] == "error":
                return name, told["message"]
            played = time.monotonic() - began
            await socket.send(json.dumps({"type": "playhead", "seconds": played}))
            if changes and played > args.seconds / 2:
                await socket.send(json.dumps(changes.pop() | {"policy": args.policy}))
    if not name:
        raise UserError("the server has closed the connection before it began a video")
    return name, "the server has closed the connection before the end"


def headers(args: argparse.Namespace) -> dict[str, str]:
    """What shows the token."""
    return {"Authorization": f"Bearer {args.token}"} if args.token else {}


def main(argv: Sequence[str]) -> int:
    """Watch, then fetch the whole file."""
    args = build_parser().parse_args(argv)
    try:
        from websockets.exceptions import WebSocketException
    except ImportError as error:
        raise UserError("this needs websockets: pip install -r requirements-app.txt") from error

    try:
        name, ended = asyncio.run(watch(args))
    except (WebSocketException, OSError) as error:
        raise UserError(f"no session at {args.address}: {error}") from error
    file = f"http://{args.address}/v1/sessions/{name}/video.mp4"
    request = urllib.request.Request(file, headers=headers(args))
    try:
        with urllib.request.urlopen(request) as answer:
            video = answer.read()
    except OSError as error:
        raise UserError(f"{file} cannot be fetched: {ended or error}") from error
    with written(args.output) as part:
        part.write_bytes(video)
    if ended:
        raise UserError(f"{args.output} is not the whole video: {ended}")
    return 0


if __name__ == "__main__":
    sys.exit(run_main(main))
