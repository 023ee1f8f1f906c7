"""Plain-torch twins of every device operation: the contract that the other folders keep."""
