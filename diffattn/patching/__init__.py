"""The only code that modifies a user's model: `patch`, the handle it returns, and the removal of a patch."""
