"""A user's network, copies of it to try things on, one call of it, and what that costs."""
