"""Pictures, tables and pages for people; never a number that is not in a stored artifact."""
