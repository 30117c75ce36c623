"""The loss as a flat list of operations, and who makes and who reads each value."""
