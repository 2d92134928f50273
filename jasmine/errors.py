"""How a process ends, and the errors whose text is the single line that a user sees.

Raise them with what is wrong, where (file, key, record) and what would be right. Entry points print them without a
traceback; everything else is a bug of ours and keeps its traceback. Exit code 0: finished; `EXIT_SAVED`: state saved, run
me again; anything else: failed.
"""

EXIT_USER_ERROR = 2
EXIT_SAVED = 75
EXIT_FAILED = 1


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, what instead."""


class ClusterError(Exception):
    """The cluster's fault: peers that do not answer, say. One line too, but another try may help (exit code 1)."""
