"""The only code that changes someone else's model: patch, the handle it returns, and the way back."""
