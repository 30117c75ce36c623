"""Why a dimension cannot grow, as one exception."""


class CannotGrow(ValueError):
    """A dimension that cannot grow, or not in the way that is tried, and why: `Site.reason` shows it."""
