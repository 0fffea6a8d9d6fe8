"""Exceptions whose text is meant for the user: the programs print it and exit."""


class UserError(Exception):
    """Bad input or settings, told in one sentence that names the option to change."""


class DivergedError(UserError):
    """The loss is no number any more."""
