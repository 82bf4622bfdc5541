"""The errors that a user can act on.

Every layer raises these for bad input; anything else that escapes is a defect of ours. No Dagster, no torch.
"""

from __future__ import annotations


class UserError(Exception):
    """Something the user can mend: says what is wrong, where, and what to do.

    `where` names the file (with line), option, model or trait; `remedy` is one imperative sentence.
    """

    def __init__(self, what: str, *, where: str | None = None, remedy: str | None = None) -> None:
        self.what = what
        self.where = where
        self.remedy = remedy
        parts = [f"{where}: {what}" if where else what]
        if remedy:
            parts.append(remedy)
        super().__init__(" — ".join(parts))


class ArtifactError(UserError):
    """A stored artifact is missing, truncated, altered, or written by a newer version."""
