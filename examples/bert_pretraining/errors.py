"""The one exception whose text is meant for the user: `pretrain.py` prints it and exits."""


class UserError(Exception):
    """Bad input or settings, told in one sentence that names the option to change."""
