"""Why a dimension cannot grow, as one exception."""


class CannotGrow(ValueError):
    """A path whose pixels cannot be brought together; the message says why."""
