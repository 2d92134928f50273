"""How a process ends, and the errors whose text is the single line that a user sees.

Raise them with what is wrong, where (file, key, record) and what would be right. Entry points print them without a
traceback; everything else is a bug of ours and keeps its traceback. Exit code 0: finished; `EXIT_SAVED`: state saved, run
me again; `EXIT_USER_ERROR`: the user's mistake, which the launcher does not try again where it comes before any step;
`EXIT_WOULD_REPEAT`: failed, and would fail again in the same place; `EXIT_FAILED` and anything else: failed, and another
try may help.
"""

EXIT_USER_ERROR = 2
EXIT_WOULD_REPEAT = 65
EXIT_SAVED = 75
EXIT_FAILED = 1


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what, where, what instead."""


class ChangedDataError(UserError):
    """Data are no longer what they were when they were opened. The launcher does not try again (exit code 65): another
    attempt would go on with other data. That is for the user to decide."""


class ClusterError(Exception):
    """The cluster's fault: peers that do not answer, or storage that is full or away (`objects.may_pass` says which of its
    errors are meant). One line too, but another try may help (exit code 1)."""


class NotFiniteError(Exception):
    """Training has come to a loss or gradient that is not a finite number. One line too; since a restart would come to the
    same one, the launcher does not try again (exit code 65)."""
