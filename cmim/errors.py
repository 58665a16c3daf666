"""Mistakes of a user: one line that names the file or key and the remedy, exit code 2, no traceback."""

import errno
import sys

# What the system says of a place that cannot be written: full, closed to us, or a file where a folder is needed.
_OF_THE_PLACE = (
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EACCES, errno.EPERM, errno.EROFS,
    errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG,
)  # fmt: skip


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, and what to do."""

    def __init__(self, message):
        # A DataLoader worker re-raises with a whole traceback as the message: keep the line that speaks.
        message = str(message).strip()
        if "DataLoader worker" in message:
            message = message.rsplit("UserError: ", 1)[-1]
        super().__init__(" ".join(message.split()))


def run_command(main):
    """Call main() and turn a user's mistake into one line on stderr and exit code 2."""
    try:
        main()
    except UserError as error:
        sys.exit(_say(str(error)))
    except OSError as error:
        if error.errno not in _OF_THE_PLACE:
            raise
        place = error.filename2 or error.filename or "the output folder"
        sys.exit(_say(f"{error.strerror}: {place}; free some space or give another --output"))
    except KeyboardInterrupt:
        sys.exit(130)


def _say(message):
    print(f"error: {message}", file=sys.stderr)
    return 2
