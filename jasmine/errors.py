"""The one exception that stands for a user's mistake: its text is the single line the user sees.

Raise it with what is wrong, where (file, key, record) and what would be right. Entry points print it without a
traceback and exit with `EXIT_USER_ERROR`; everything else is a bug of ours and keeps its traceback.
"""

EXIT_USER_ERROR = 2
EXIT_FAILED = 1


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, what instead."""


class ClusterError(Exception):
    """The cluster's fault: peers that do not answer, say. One line too, but another try may help (exit code 1)."""
