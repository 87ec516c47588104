"""Who is there, in which state, and what they keep."""
