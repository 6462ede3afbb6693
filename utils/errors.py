"""What a person did wrong, told apart from what the program did wrong."""

BAD_INPUT = 2  # exit code


class UserError(Exception):
    """Bad input: a missing file, a wrong key, an impossible value.

    The message is one clear sentence that says what to do. Entry points print it without a
    traceback and exit with code `BAD_INPUT` (see `utils.cli.run_main`).
    """
